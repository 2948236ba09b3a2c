//! The rule about threads: calls on one instance are serial, and any thread may make them.

use std::thread;

use kvhook_abi::ids::IDS;
use kvhook_abi::raw::KvhStr;

use super::subject::{Subject, end};
use super::{broken, holds};
use crate::fault::Fault;
use crate::instance::Instance;

/// Runs something on a thread of its own, and waits for it.
fn elsewhere<T: Send>(work: impl FnOnce() -> Result<T, Fault> + Send) -> Result<T, Fault> {
    thread::scope(|scope| scope.spawn(work).join()).unwrap_or_else(|_| broken("a thread of the mock engine panicked"))
}

pub(super) fn any_thread_may_call(subject: &Subject) -> Result<(), Fault> {
    let prompt = subject.prompt(1, 1, 150);
    let expected = subject.run_one(&mut subject.instance()?, &prompt, 1)?;
    // `needs` follows `create` on its thread.
    let mut instance = elsewhere(|| {
        let mut instance = subject.instance()?;
        instance.needs().map(|_| instance)
    })?;
    elsewhere(|| instance.bound(&prompt))?;
    for round in 0..3 {
        // What was shown on one thread is planned with on another.
        elsewhere(|| subject.show(&mut instance, std::slice::from_ref(&prompt), &[1]))?;
        let answer = elsewhere(|| instance.plan_one(&prompt))?;
        holds(answer == expected, || format!("another plan in round {round}, with each call on another thread"))?;
        elsewhere(|| end(&mut instance, 1))?;
    }
    // Tables are asked for at any time, from several threads at once.
    if let Some(hook) = subject.entry.hook {
        let table = |id: &str| {
            // SAFETY: `hook` takes any text.
            unsafe { hook(KvhStr::new(id)) }.addr()
        };
        let tables: Vec<usize> = IDS.iter().map(|(_, id)| table(id)).collect();
        let all = || (0..1000).all(|_| IDS.iter().zip(&tables).all(|((_, id), expected)| table(id) == *expected));
        let same = thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(all)).collect();
            threads.into_iter().all(|thread| thread.join().unwrap_or(false))
        });
        holds(same, || "`hook` gives other tables while several threads ask".into())?;
    }
    elsewhere(move || {
        drop::<Instance>(instance);
        Ok(())
    })
}
