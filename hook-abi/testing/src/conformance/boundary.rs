//! Rules of the boundary itself: the entry, ids, nulls, sizes.

use std::ptr;

use kvhook_abi::ids::*;
use kvhook_abi::raw::*;

use super::subject::Subject;
use super::{broken, holds};
use crate::arrays::Message;
use crate::fault::Fault;
use crate::instance::Instance;
use crate::random::Random;

pub(super) fn entry_is_whole(subject: &Subject) -> Result<(), Fault> {
    let entry = subject.entry;
    holds(entry.struct_size >= size_of::<KvhPluginEntry>(), || {
        format!("`struct_size` is {}; an entry has {} bytes", entry.struct_size, size_of::<KvhPluginEntry>())
    })?;
    holds(entry.abi_major == KVH_ABI_MAJOR, || format!("`abi_major` is {}; this is {KVH_ABI_MAJOR}", entry.abi_major))?;
    holds(entry.required_host_minor <= entry.abi_minor, || {
        format!("requires host minor {}, built with {}", entry.required_host_minor, entry.abi_minor)
    })?;
    for (field, text) in [("id", entry.id), ("version", entry.version)] {
        // SAFETY: a static's text.
        match unsafe { kvhook_abi::boundary::text(text, field) } {
            Ok("") => return broken(format!("`{field}` is empty")),
            Ok(_) => {}
            Err(error) => return broken(error.to_string()),
        }
    }
    holds(entry.fingerprints.count > 0, || "`fingerprints` is empty; a host cannot check any layout".into())?;
    let functions = [entry.create.is_some(), entry.destroy.is_some(), entry.needs.is_some(), entry.hook.is_some()];
    match ["create", "destroy", "needs", "hook"].iter().zip(functions).find(|(_, there)| !there) {
        Some((name, _)) => broken(format!("`{name}` is null")),
        None => Ok(()),
    }
}

pub(super) fn unknown_ids_are_null(subject: &Subject) -> Result<(), Fault> {
    let Some(hook) = subject.entry.hook else { return broken("`hook` is null") };
    let mut random = Random::new(subject.seed);
    let garbage: Vec<Vec<u8>> =
        (0..200).map(|_| (0..random.below(100)).map(|_| random.bits() as u8).collect()).collect();
    let near = [KVH_ON_PREFILL_DONE_1, KVH_ON_GROWN_1, KVH_BEFORE_ATTENTION_1, KVH_ON_FREE_1]
        .iter()
        .flat_map(|id| [id.replace("/1", "/2"), id.to_uppercase(), format!("{id} "), id[..id.len() - 1].to_owned()])
        .map(String::into_bytes);
    let long = vec![vec![b'k'; 1 << 20], b"kvh.on_free/1\0".to_vec()];
    let null = KvhStr { data: ptr::null(), length: 0 };
    // SAFETY: `hook` takes any text.
    holds(unsafe { hook(null) }.is_null(), || "a table for the empty id".into())?;
    for id in near.chain(garbage).chain(long) {
        // SAFETY: as above.
        let answer = unsafe { hook(KvhStr { data: id.as_ptr().cast(), length: id.len() }) };
        holds(answer.is_null(), || format!("a table for the id {:?}", String::from_utf8_lossy(&id)))?;
    }
    for id in IDS.iter().map(|(_, id)| id) {
        // SAFETY: as above.
        let (first, second) = unsafe { (hook(KvhStr::new(id)), hook(KvhStr::new(id))) };
        holds(first == second, || format!("two tables for `{id}`: {first:p}, then {second:p}"))?;
    }
    Ok(())
}

/// A function by name, called with an instance and whether its arguments are null; otherwise they say `struct_size` 8.
type Call = (&'static str, Box<dyn Fn(*mut KvhInstance, bool, *mut KvhText) -> KvhStatus>);

/// Every function that a plugin implements, with arguments that no plugin may take.
fn bad_calls(instance: &Instance) -> Vec<Call> {
    let mut calls: Vec<Call> = Vec::new();
    /// A function whose arguments all are structs that begin with their size.
    macro_rules! call {
        ($name:literal, $function:expr, $($argument:ident),*) => {
            if let Some(function) = $function {
                calls.push(($name, Box::new(move |instance, null, error| {
                    $(let mut $argument = [0usize; 64]; $argument[0] = 8;)*
                    // SAFETY: null, or memory of which the first word says that nothing else of it may be read.
                    unsafe {
                        function(
                            instance,
                            $(if null { ptr::null_mut() } else { $argument.as_mut_ptr().cast() },)*
                            error,
                        )
                    }
                })));
            }
        };
    }
    // SAFETY: the tables that the ids name.
    let (done, grown, before, free) = unsafe {
        (
            instance.hook::<KvhOnPrefillDone1>(KVH_ON_PREFILL_DONE_1),
            instance.hook::<KvhOnGrown1>(KVH_ON_GROWN_1),
            instance.hook::<KvhBeforeAttention1>(KVH_BEFORE_ATTENTION_1),
            instance.hook::<KvhOnFree1>(KVH_ON_FREE_1),
        )
    };
    call!("needs", instance.entry().needs, needs);
    call!("bound", done.and_then(|table| table.bound), args, out);
    call!("on_prefill_done", done.and_then(|table| table.on_prefill_done), args, out);
    call!("bound of kvh.on_grown/1", grown.and_then(|table| table.bound), args, out);
    call!("on_grown", grown.and_then(|table| table.on_grown), args, out);
    call!("before_attention", before.and_then(|table| table.before_attention), args);
    call!("on_free", free.and_then(|table| table.on_free), args);
    calls
}

pub(super) fn null_arguments_are_refused(subject: &Subject) -> Result<(), Fault> {
    let instance = subject.instance()?;
    let (Some(create), Some(destroy)) = (subject.entry.create, subject.entry.destroy) else {
        return broken("`create` or `destroy` is null");
    };
    let mut out = ptr::null_mut();
    for error in [ptr::null_mut(), Message::new().raw()] {
        // SAFETY: null may be passed; that is what is checked.
        let statuses =
            unsafe { [create(ptr::null(), &raw mut out, error), create(ptr::null(), ptr::null_mut(), error)] };
        holds(!statuses.contains(&KVH_OK), || "`create` takes null arguments".into())?;
    }
    for (name, call) in bad_calls(&instance) {
        for (what, of) in [("instance", ptr::null_mut()), ("argument", instance.raw())] {
            let mut error = Message::new();
            let status = call(of, true, error.raw());
            holds(status != KVH_OK, || format!("`{name}` takes a null {what}"))?;
            holds(!error.read()?.is_empty(), || format!("`{name}` refuses a null {what} without a text"))?;
            holds(call(of, true, ptr::null_mut()) != KVH_OK, || {
                format!("`{name}` takes a null {what}, given no buffer")
            })?;
        }
    }
    // SAFETY: as above.
    unsafe { destroy(ptr::null_mut()) };
    works_after(subject, instance)
}

pub(super) fn short_structs_are_refused(subject: &Subject) -> Result<(), Fault> {
    let instance = subject.instance()?;
    for (name, call) in bad_calls(&instance) {
        let mut error = Message::new();
        let status = call(instance.raw(), false, error.raw());
        holds(status != KVH_OK, || format!("`{name}` takes structs of 8 bytes"))?;
        holds(!error.read()?.is_empty(), || format!("`{name}` refuses structs of 8 bytes without a text"))?;
    }
    works_after(subject, instance)
}

/// A refusal does not poison.
fn works_after(subject: &Subject, mut instance: Instance) -> Result<(), Fault> {
    subject.run_one(&mut instance, &subject.prompt(1, 1, 64), 1).map(drop)
}
