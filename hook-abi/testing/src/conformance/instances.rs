//! Rules about instances: needs, lives, threads, time.

use std::fs;
use std::time::Duration;

use kvhook_abi::KVH_ON_FREE_1;
use kvhook_abi::raw::*;

use super::subject::{Subject, end};
use super::{broken, holds};
use crate::arrays::Message;
use crate::clock::Clock;
use crate::fault::Fault;

/// Longest that loading the file may take; all of these are processor time.
const LOAD: Duration = Duration::from_secs(5);
/// Longest that an instance may take.
const CREATE: Duration = Duration::from_secs(1);
/// Longest that a bound may take.
const BOUND: Duration = Duration::from_secs(1);
/// Longest that a plan for 4,096 rows may take, for each layer.
const PLAN: Duration = Duration::from_secs(5);

pub(super) fn needs_are_known(subject: &Subject) -> Result<(), Fault> {
    let needs = subject.instance()?.needs()?;
    let known = (KVH_CAN_GROWN << 1) - 1;
    holds(needs.must & !known == 0, || format!("`must` has unknown bits: {:#x}", needs.must & !known))?;
    let phases = KVH_PHASE_PREFILL | KVH_PHASE_DECODE;
    holds(needs.phases & !phases == 0, || format!("unknown phases: {:#x}", needs.phases & !phases))?;
    let pairs = [
        (needs.phases != 0, KVH_CAN_QUERIES, "`before_attention`", "queries"),
        (needs.grown_every != 0, KVH_CAN_GROWN, "`on_grown`", "grown"),
    ];
    for (asks, bit, what, offer) in pairs {
        holds(!asks || needs.must & bit != 0, || format!("asks for {what} and does not need `{offer}`"))?;
    }
    holds(subject.instance()?.needs()? == needs, || "two instances with one config need different things".into())
}

/// Memory in KiB, threads and open files of this process.
fn held() -> Result<[u64; 3], Fault> {
    let status = fs::read_to_string("/proc/self/status");
    let files = fs::read_dir("/proc/self/fd").map(Iterator::count);
    let (Ok(status), Ok(files)) = (status, files) else { return broken("/proc/self cannot be read") };
    let value = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.split_whitespace().next()).and_then(|value| value.parse().ok()).unwrap_or(0)
    };
    Ok([value("VmRSS:"), value("Threads:"), files as u64])
}

pub(super) fn leave_nothing(subject: &Subject) -> Result<(), Fault> {
    let prompt = subject.prompt(1, 1, 40);
    let round = |times: usize| -> Result<(), Fault> {
        (0..times).try_for_each(|_| subject.run_one(&mut subject.instance()?, &prompt, 1).map(drop))
    };
    // What is made once, and pools, are made.
    round(200)?;
    let before = held()?;
    round(1000)?;
    let after = held()?;
    // 1 KiB for each instance is what an allocator may scatter.
    let limits = [before[0] + 1024, before[1], before[2]];
    for ((what, after), (before, limit)) in
        ["KiB of memory", "threads", "open files"].iter().zip(after).zip(before.iter().zip(limits))
    {
        holds(after <= limit, || format!("{before} {what} before 1,000 instances, {after} after"))?;
    }
    Ok(())
}

pub(super) fn are_independent(subject: &Subject) -> Result<(), Fault> {
    let data = [1, 2, 3, 4];
    let plan = |data: u64| subject.run_one(&mut subject.instance()?, &subject.prompt(data, data, 150), data);
    let expected = data.map(plan);
    // Side by side on one thread: all are made, then each plans.
    let mut instances = Vec::new();
    for _ in data {
        instances.push(subject.instance()?);
    }
    for ((data, expected), instance) in data.iter().zip(&expected).zip(&mut instances) {
        let found = subject.run_one(instance, &subject.prompt(*data, *data, 150), *data);
        holds(found == *expected, || format!("instance {data} of four plans something else than alone"))?;
    }
    let found = std::thread::scope(|scope| {
        let threads = data.map(|data| scope.spawn(move || (0..20).map(|_| plan(data)).collect::<Vec<_>>()));
        threads.map(|thread| thread.join().unwrap_or_default())
    });
    for ((data, expected), found) in data.iter().zip(&expected).zip(found) {
        let all = found.len() == 20 && found.iter().all(|found| found == expected);
        holds(all, || format!("instance {data} of four, each on a thread, plans something else than alone"))?;
    }
    Ok(())
}

pub(super) fn freed_is_forgotten(subject: &Subject) -> Result<(), Fault> {
    let mut instance = subject.instance()?;
    // SAFETY: the table that the id names.
    let table = unsafe { instance.hook::<KvhOnFree1>(KVH_ON_FREE_1) };
    let Some(on_free) = table.and_then(|table| table.on_free) else {
        let needs = instance.needs()?;
        return holds(needs.must & KVH_CAN_STATE == 0, || "keeps state for sequences and has no `on_free`".into());
    };
    for reason in [KVH_FREE_FINISHED, KVH_FREE_CANCELLED, KVH_FREE_PREEMPTED, KVH_FREE_RESET] {
        instance.free_for(u64::MAX, reason)?;
    }
    let prompt = subject.prompt(1, 1, 150);
    let first = subject.run(&mut instance, std::slice::from_ref(&prompt), &[1])?;
    // From another thread, as an engine that cancels a request may.
    let raw = instance.raw().expose_provenance();
    let freed = std::thread::scope(|scope| {
        let free = move || {
            let args = KvhOnFreeArgs {
                struct_size: size_of::<KvhOnFreeArgs>(),
                uid: 1,
                reason: KVH_FREE_CANCELLED,
                reserved0: 0,
                stream: std::ptr::null_mut(),
            };
            let mut error = Message::new();
            // SAFETY: the instance lives, and no other call is running.
            let status = unsafe { on_free(std::ptr::with_exposed_provenance_mut(raw), &raw const args, error.raw()) };
            error.outcome(status)
        };
        scope.spawn(free).join()
    });
    freed.unwrap_or_else(|_| broken("`on_free` panicked"))?;
    instance.host().take_back(Some(1));
    // A plan without what was shown before: as a fresh instance, which saw nothing.
    let bare = instance.plan_one(&prompt)?;
    holds(bare == subject.instance()?.plan_one(&prompt)?, || "something of a freed sequence is left".into())?;
    end(&mut instance, 1)?;
    let again = subject.run(&mut instance, std::slice::from_ref(&prompt), &[1])?;
    holds(again == first, || "another plan for the same sequence after it was freed".into())
}

pub(super) fn calls_are_quick(subject: &Subject) -> Result<String, Fault> {
    let mut told = String::new();
    let mut within = |what: &str, took: Duration, over: Option<Duration>| match over {
        Some(took) => broken(format!("{what} took {} ms", took.as_millis())),
        None => {
            let between = if told.is_empty() { "" } else { ", " };
            told += &format!("{between}{what} {:.1} ms", took.as_secs_f64() * 1e3);
            Ok(())
        }
    };
    if let Some(file) = &subject.file {
        within("loading", file.load_time, (file.load_time > LOAD).then_some(file.load_time))?;
    }
    let clock = Clock::start();
    let mut instance = subject.instance()?;
    within("an instance", clock.elapsed(), clock.over(CREATE))?;
    let prompt = subject.prompt(1, 1, 4096);
    let clock = Clock::start();
    instance.bound(&prompt)?;
    within("a bound", clock.elapsed(), clock.over(BOUND))?;
    let layers = subject.shape.layers.max(1) as u32;
    let clock = Clock::start();
    instance.plan_one(&prompt)?;
    within("a plan, for each layer,", clock.elapsed() / layers, clock.over(PLAN * layers))?;
    Ok(told)
}
