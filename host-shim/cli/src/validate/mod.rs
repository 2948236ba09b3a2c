//! `kvhook validate`: the conformance rules of `kvhook-testing` on a plugin's file.
//!
//! The file is opened as a host opens it, and what can be checked without running it is checked first. Then each rule runs
//! in a process of its own: this program again, for that rule. So a plugin that crashes or hangs breaks one
//! rule and no more.

mod process;
pub mod report;

use std::time::{Duration, Instant};

use kvhook_abi::raw::KVH_ERR_PANIC;
use kvhook_host::HostError;
use kvhook_host::load::{self, Library, PluginImage, Policy, Source};
use kvhook_host::raw::{KVHOOK_ERR_NO_ENTRY, KVHOOK_ERR_NOT_ELF, KVHOOK_ERR_WRONG_ARCHITECTURE};
use kvhook_testing::Fault;
use kvhook_testing::clock::Clock;
use kvhook_testing::conformance::{File, RULES, Rule, Subject};

use crate::args::{ModelShape, Validate};
use crate::error::CliError;
use crate::plugins;

use report::{Outcome, Report, RuleReport};

/// The rule that a file breaks which a host refuses without running it.
const METADATA_RULE: &str = "metadata-is-true";

/// Checks the rules that were asked for. `done` is told of each one.
///
/// # Errors
/// [`CliError::NotAPlugin`] where there is nothing to check, [`CliError::Validate`] where nothing can be.
pub fn validate(options: &Validate, done: &mut dyn FnMut(&RuleReport)) -> Result<Report, CliError> {
    let rules = chosen(&options.only)?;
    let not_a_plugin = |source| CliError::NotAPlugin { plugin: options.plugin.clone(), source };
    let policy = Policy::new(plugins::folders([options.plugin.as_str()]), None);
    let image =
        policy.open(&options.plugin, Source::Operator).and_then(load::PluginFile::read).map_err(not_a_plugin)?;
    let mut report = Report::new(options, image.hash().to_string());
    let mut add = |rule: &'static Rule, outcome: Outcome, started: Instant| {
        let rule = RuleReport::new(rule, outcome, started.elapsed());
        done(&rule);
        rule
    };
    let started = Instant::now();
    match load::check_without_running(image.bytes()) {
        Ok(metadata) => (report.id, report.version) = (metadata.id, metadata.version),
        Err(error) if is_no_plugin(&error) => return Err(not_a_plugin(error)),
        Err(error) => {
            let reason = format!("a host refuses the file before any of it runs: {error}");
            let outcome = |rule: &Rule| match rule.name {
                METADATA_RULE => Outcome::Broken { reason: reason.clone() },
                _ => Outcome::NotRun { reason: reason.clone() },
            };
            report.rules = rules.into_iter().map(|rule| add(rule, outcome(rule), started)).collect();
            return Ok(report);
        }
    }
    let inside = if options.in_process { Some(Inside::load(options, &policy, &image)) } else { None };
    for rule in rules {
        let started = Instant::now();
        let outcome = match &inside {
            Some(inside) => inside.check(rule)?,
            None => process::check(options, rule)?,
        };
        report.rules.push(add(rule, outcome, started));
    }
    Ok(report)
}

/// Whether a file is something else altogether, not a plugin with a fault.
fn is_no_plugin(error: &HostError) -> bool {
    [KVHOOK_ERR_NOT_ELF, KVHOOK_ERR_WRONG_ARCHITECTURE, KVHOOK_ERR_NO_ENTRY].contains(&error.status())
}

/// The rules of these names, by number; all where there are none.
fn chosen(names: &[String]) -> Result<Vec<&'static Rule>, CliError> {
    if let Some(unknown) = names.iter().find(|name| Rule::named(name).is_none()) {
        let known = RULES.iter().map(|rule| rule.name).collect::<Vec<_>>().join(", ");
        return Err(CliError::Validate(format!("no rule is called `{unknown}`; the rules are {known}")));
    }
    Ok(RULES.iter().filter(|rule| names.is_empty() || names.iter().any(|name| name == rule.name)).collect())
}

/// The plugin in this process.
enum Inside {
    Loaded(Box<Subject>),
    Refused(HostError),
}

impl Inside {
    fn load(options: &Validate, policy: &Policy, image: &PluginImage) -> Self {
        let clock = Clock::start();
        let loaded = load::load_image(image, None, &policy.copy_folder);
        let load_time = clock.busy();
        let described = || -> Result<Self, HostError> {
            // For the rest of this process, which checks one plugin.
            let library: &'static Library = Box::leak(Box::new(loaded?));
            let metadata = load::check_without_running(image.bytes())?;
            let file = File { metadata, imports: load::imports(image.bytes())?, load_time };
            let subject = Subject {
                shape: options.shape.0,
                seed: options.seed,
                rope_base: options.rope_base,
                file: Some(file),
                ..Subject::new(library.entry(), options.config.clone())
            };
            Ok(Self::Loaded(Box::new(subject)))
        };
        described().unwrap_or_else(Self::Refused)
    }

    fn check(&self, rule: &Rule) -> Result<Outcome, CliError> {
        let subject = match self {
            Self::Loaded(subject) => subject,
            Self::Refused(error) => return Ok(Outcome::Broken { reason: format!("a host refuses it: {error}") }),
        };
        let found = match rule.check(subject) {
            Ok(note) => return Ok(Outcome::Holds { note }),
            Err(fault) => fault,
        };
        // What looks like a broken rule may be a config, or a model, that the plugin does not take.
        match subject.instance() {
            Err(Fault::Refused { status, message }) if status != KVH_ERR_PANIC => Err(CliError::Validate(format!(
                "the plugin makes no instance with the config `{}` and the shape {}: {message}; \
                 give others with --config, --shape and --rope-base",
                subject.config,
                ModelShape(subject.shape)
            ))),
            _ => Ok(Outcome::Broken { reason: found.to_string() }),
        }
    }
}

/// A time limit in words.
fn seconds(limit: Duration) -> String {
    format!("{} s", limit.as_secs_f64())
}
