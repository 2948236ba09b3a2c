//! Rules about configs.

use std::time::Duration;

use super::broken;
use super::subject::Subject;
use crate::clock::Clock;
use crate::fault::Fault;
use crate::random::Random;

/// Longest that a config may take, in processor time.
const LIMIT: Duration = Duration::from_secs(1);
/// Configs that are made from the good one by changing some bytes.
const CHANGED: usize = 500;

pub(super) fn bad_configs_are_refused(subject: &Subject) -> Result<(), Fault> {
    let mut random = Random::new(subject.seed);
    let good = subject.config.as_bytes();
    let fixed: [Vec<u8>; 12] = [
        b"no_plugin_has_this_key=1".to_vec(),
        b"{\"no_plugin_has_this_key\": 1}".to_vec(),
        b"{".to_vec(),
        b"[]".to_vec(),
        b"null".to_vec(),
        b"=".to_vec(),
        b",,,".to_vec(),
        b"a=".to_vec(),
        b"\xff\xfe".to_vec(),
        b"\0".to_vec(),
        vec![b'['; 1 << 16],
        vec![b'x'; 1 << 20],
    ];
    let refused = |config: &[u8]| match create(subject, config)? {
        Some(_) => Ok(()),
        None => broken(format!("the config {} is taken", shown(config))),
    };
    // The first two are a mistake in any plugin: it is named, not passed over.
    fixed[..2].iter().try_for_each(|config| refused(config))?;
    fixed[2..].iter().try_for_each(|config| create(subject, config).map(drop))?;
    for _ in 0..CHANGED {
        let mut config = good.to_vec();
        for _ in 0..=random.below(4) {
            let place = random.below(config.len() as u64 + 1) as usize;
            let byte = match random.below(3) {
                0 => random.bits() as u8,
                1 => b"0123456789.-=,:{}[]\""[random.below(20) as usize],
                _ => b'a' + random.below(26) as u8,
            };
            match config.get_mut(place) {
                Some(old) if random.below(2) == 0 => *old = byte,
                _ => config.insert(place, byte),
            }
        }
        create(subject, &config)?;
    }
    Ok(())
}

/// The plugin's words where it refuses a config.
fn create(subject: &Subject, config: &[u8]) -> Result<Option<String>, Fault> {
    let clock = Clock::start();
    let outcome = subject.default_engine().create(subject.entry, config);
    if let Some(took) = clock.over(LIMIT) {
        return broken(format!("the config {} took {} ms", shown(config), took.as_millis()));
    }
    match outcome {
        Ok(_) => Ok(None),
        Err(Fault::Refused { status: kvhook_abi::raw::KVH_ERR_PANIC, message }) => {
            broken(format!("the config {}: {message}", shown(config)))
        }
        Err(Fault::Refused { message, .. }) if message.is_empty() => {
            broken(format!("the config {} is refused without a text", shown(config)))
        }
        Err(Fault::Refused { message, .. }) => Ok(Some(message)),
        Err(fault) => Err(fault),
    }
}

fn shown(config: &[u8]) -> String {
    let text = String::from_utf8_lossy(&config[..config.len().min(60)]);
    if config.len() > 60 { format!("{text:?}... ({} bytes)", config.len()) } else { format!("{text:?}") }
}
