//! Each rule can fail: a plugin for every one of them that breaks it.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not there")]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kvhook_abi::export::{Static, Tables};
use kvhook_abi::raw::*;
use kvhook_abi::{
    Bound, BoundArgs, Call, CreateContext, FreeReason, Hooks, Memory, Plugin, PluginError, Reason, Request, Requests,
};
use kvhook_testing::conformance::{RULES, Rule, Subject};
use kvhook_testing::entry;

kvhook_abi::words! {
    /// What a plugin does wrong.
    enum Breaks {
        Nothing = "nothing",
        /// Its plan depends on what other instances did.
        Independence = "independence",
        /// Its bound depends on the order of calls.
        Bound = "bound",
        /// Its plan depends on the layout.
        Layout = "layout",
        /// Its plan depends on the sequence's name.
        Uid = "uid",
        /// It panics where memory is refused.
        Memory = "memory",
        /// It panics where a key is not a number.
        Numbers = "numbers",
        /// It remembers a sequence that is over.
        Free = "free",
        /// It is slow to make.
        Time = "time",
    }
}

kvhook_abi::config! {
    struct Config {
        /// What it does wrong.
        breaks: Breaks = "nothing";
    }
}

/// Keeps the last half of the rows, or something else where it breaks a rule.
struct Bad {
    breaks: Breaks,
    bounds: AtomicU64,
    seen: Vec<u64>,
}

static PLANS: AtomicU64 = AtomicU64::new(0);

impl Plugin for Bad {
    type Config = Config;
    const ID: &'static str = "bad";
    const VERSION: &'static str = "1.0.0";
    const HOOKS: Hooks = Hooks::ON_PREFILL_DONE.and(Hooks::ON_FREE);

    fn create(_: &CreateContext<'_>, config: Config) -> Result<Self, PluginError> {
        if config.breaks == Breaks::Time {
            std::thread::sleep(Duration::from_millis(1100));
        }
        Ok(Self { breaks: config.breaks, bounds: AtomicU64::new(0), seen: Vec::new() })
    }

    fn bound(&self, args: &BoundArgs<'_>) -> Result<Bound, PluginError> {
        let more = if self.breaks == Breaks::Bound { self.bounds.fetch_add(1, Ordering::Relaxed) % 2 } else { 0 };
        Ok(Bound::Rows(args.lengths().map(|length| (length / 2 + more).clamp(1, length)).collect()))
    }

    fn on_prefill_done(&mut self, call: &Call<'_>, requests: Requests<'_>) -> Result<(), PluginError> {
        for request in requests {
            let Request { sequence, mut plan } = request?;
            let memory = call.allocate::<u8>(Memory::Call, 8).map(drop);
            assert!(memory.is_ok() || self.breaks != Breaks::Memory, "no memory");
            let plans = PLANS.fetch_add(1, Ordering::Relaxed);
            let again = self.seen.contains(&sequence.uid());
            self.seen.push(sequence.uid());
            for index in 0..sequence.layer_count() {
                let layer = sequence.layer(index)?;
                let (length, count) = (layer.length(), (layer.length() / 2).max(1));
                let k = layer.k()?;
                if self.breaks == Breaks::Numbers {
                    let mut row = vec![0.0; k.head_dim()];
                    k.load(length / 2, 0, &mut row)?;
                    assert!(row.iter().all(|value| value.is_finite()), "a key that is no number");
                }
                let first = match self.breaks {
                    Breaks::Independence => plans.is_multiple_of(2),
                    Breaks::Layout => k.layout().stride_head > k.layout().stride_token,
                    Breaks::Uid => sequence.uid() > 100,
                    Breaks::Free => again,
                    _ => false,
                };
                let from = if first { 0 } else { length - count };
                let rows: Vec<u32> = (from..from + count).map(|row| row as u32).collect();
                if count < length {
                    plan.select_shared(index, &rows)?;
                }
            }
            if sequence.layer(0)?.length() == 1 {
                plan.keep(Reason::NoGain, "")?;
            }
        }
        Ok(())
    }

    fn on_free(&mut self, uid: u64, _: FreeReason) -> Result<(), PluginError> {
        if self.breaks != Breaks::Free {
            self.seen.retain(|seen| *seen != uid);
        }
        Ok(())
    }
}

static BAD: Static<KvhPluginEntry> = Tables::<Bad>::entry();

/// `bad` with other functions.
fn with(change: impl FnOnce(&mut KvhPluginEntry)) -> &'static KvhPluginEntry {
    let good = BAD.get();
    let mut entry = KvhPluginEntry { id: good.id, version: good.version, fingerprints: good.fingerprints, ..*good };
    change(&mut entry);
    Box::leak(Box::new(entry))
}

unsafe extern "C" fn a_table_for_everything(_: KvhStr) -> *const std::ffi::c_void {
    // SAFETY: an id that the plugin implements.
    unsafe { BAD.get().hook.unwrap()(KvhStr::new("kvh.on_prefill_done/1")) }
}

unsafe extern "C" fn needs_nothing(_: *mut KvhInstance, _: *mut KvhNeeds, _: *mut KvhText) -> KvhStatus {
    KVH_OK
}

unsafe extern "C" fn needs_of_any_size(
    instance: *mut KvhInstance,
    needs: *mut KvhNeeds,
    error: *mut KvhText,
) -> KvhStatus {
    if instance.is_null() || needs.is_null() {
        // SAFETY: passed on.
        return unsafe { BAD.get().needs.unwrap()(instance, needs, error) };
    }
    KVH_OK
}

unsafe extern "C" fn create_from_anything(
    args: *const KvhCreateArgs,
    instance: *mut *mut KvhInstance,
    error: *mut KvhText,
) -> KvhStatus {
    // SAFETY: passed on, with an empty config.
    unsafe {
        let args = &*args;
        let args = KvhCreateArgs { config: KvhStr::new(""), ..*args };
        BAD.get().create.unwrap()(&raw const args, instance, error)
    }
}

unsafe extern "C" fn destroy_not_all(instance: *mut KvhInstance) {
    vec![1u8; 1 << 14].leak();
    // SAFETY: passed on.
    unsafe { BAD.get().destroy.unwrap()(instance) };
}

fn rule(name: &str) -> &'static Rule {
    RULES.iter().find(|rule| rule.name == name).unwrap_or_else(|| panic!("no rule is called {name}"))
}

#[test]
fn numbers_and_names_are_unique() {
    for (place, rule) in RULES.iter().enumerate() {
        assert_eq!(rule.number as usize, place + 1);
        assert!(RULES[..place].iter().all(|other| other.name != rule.name));
        assert!(rule.name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-'), "{}", rule.name);
    }
}

#[test]
fn plugins_that_keep_the_rules_pass() {
    for entry in [BAD.get(), entry!(kvhook_faulty)] {
        for rule in RULES {
            // What a test framework holds beside is not the plugin's: this rule is checked in a process of its own.
            if rule.name != "instances-leave-nothing" {
                rule.check(&Subject::new(entry, "")).unwrap_or_else(|fault| panic!("{}: {fault}", rule.name));
            }
        }
    }
}

#[test]
fn each_rule_can_be_broken() {
    let bad = BAD.get();
    let faulty = entry!(kvhook_faulty);
    let cases: [(&str, &'static KvhPluginEntry, &str, &str); 24] = [
        ("entry-is-whole", with(|entry| entry.destroy = None), "", "`destroy` is null"),
        ("entry-is-whole", with(|entry| entry.abi_major = 2), "", "`abi_major` is 2"),
        ("entry-is-whole", with(|entry| entry.id = KvhStr::new("")), "", "`id` is empty"),
        ("unknown-ids-are-null", with(|entry| entry.hook = Some(a_table_for_everything)), "", "for the empty id"),
        ("null-arguments-are-refused", with(|entry| entry.needs = Some(needs_nothing)), "", "takes a null instance"),
        ("short-structs-are-refused", with(|entry| entry.needs = Some(needs_of_any_size)), "", "structs of 8 bytes"),
        ("larger-structs-are-taken", faulty, "damage=write-tail", "behind the struct"),
        ("bad-configs-are-refused", with(|entry| entry.create = Some(create_from_anything)), "", "is taken"),
        ("needs-are-known", faulty, "must=1099511627776", "unknown bits"),
        ("needs-are-known", faulty, "phases=1", "does not need `queries`"),
        ("needs-are-known", faulty, "phases=4,must=1", "unknown phases"),
        ("instances-leave-nothing", with(|entry| entry.destroy = Some(destroy_not_all)), "", "KiB of memory"),
        ("instances-are-independent", bad, "breaks=independence", "something else than alone"),
        ("plans-keep-the-bound", bad, "breaks=bound", "two bounds"),
        ("plans-keep-the-bound", faulty, "damage=write-cache", "never writes into the cache"),
        ("plans-keep-the-bound", faulty, "damage=descending", "do not ascend"),
        ("every-dtype-and-layout", bad, "breaks=layout", "another plan for f32 as TokenMajor"),
        ("same-in-same-out", bad, "breaks=uid", "as sequence 9000000001"),
        ("refused-memory-is-survived", bad, "breaks=memory", "the plugin panicked: no memory"),
        ("values-that-are-no-numbers", bad, "breaks=numbers", "a key that is no number"),
        ("freed-is-forgotten", bad, "breaks=free", "a freed sequence"),
        ("freed-is-forgotten", faulty, "free=fail", "on_free goes wrong"),
        ("calls-are-quick", bad, "breaks=time", "an instance took 1"),
        ("same-in-same-out", faulty, "prefill_done=panic,after=3", "on_prefill_done goes wrong"),
    ];
    for (name, entry, config, words) in cases {
        let fault = rule(name).check(&Subject::new(entry, config)).expect_err(name);
        assert!(fault.to_string().contains(words), "{name}, `{config}`: {fault}");
    }
    for rule in RULES {
        assert!(cases.iter().any(|(name, ..)| *name == rule.name), "nothing breaks {}", rule.name);
    }
}
