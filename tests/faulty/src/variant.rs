//! Libraries that are wrong in themselves: other versions, other layouts, null functions.

use std::ffi::c_void;
use std::ptr;
use std::sync::OnceLock;

use kvhook_abi::boundary;
use kvhook_abi::export::Tables;
use kvhook_abi::ids::*;
use kvhook_abi::layout::{FINGERPRINTS, ROW_COUNT};
use kvhook_abi::raw::*;

use crate::damage;
use crate::plugin::Faulty;

/// What stands before the variant's word in the file.
pub const MARK: &[u8; 16] = b"KVH_FAULTY_WORD=";
/// Bytes of a word, filled up with dots.
pub const WORD_BYTES: usize = 16;
/// The words, and what each variant does wrong.
pub const WORDS: &[(&str, &str)] = &[
    ("good", "nothing"),
    ("major", "says ABI major 2"),
    ("minor", "requires the host's minor and one more"),
    ("fingerprint", "has another layout of KvhPlan"),
    ("no-fingerprints", "lists no layouts"),
    ("null-entry", "has no entry"),
    ("small-entry", "says that its entry has 8 bytes"),
    ("no-id", "has an empty id"),
    ("bad-id", "has an id that is not UTF-8"),
    ("other-id", "has another id than its metadata"),
    ("null-create", "lacks create"),
    ("null-destroy", "lacks destroy"),
    ("null-needs", "lacks needs"),
    ("null-hook", "lacks hook"),
    ("null-bound", "lacks bound in kvh.on_prefill_done/1"),
    ("null-prefill", "lacks on_prefill_done"),
    ("null-grown", "lacks on_grown"),
    ("null-before", "lacks before_attention"),
    ("null-free", "lacks on_free"),
    ("no-hooks", "implements no hook point"),
    ("no-instance", "create succeeds without an instance"),
    ("any-table", "gives a table for every id"),
    ("needs-null", "answers needs without an instance"),
    ("needs-short", "answers needs in a struct of any size"),
    ("any-config", "takes any config as an empty one"),
    ("leak", "leaves memory behind in destroy"),
];

/// The mark and the word, as tests find and overwrite them in a copy of the file.
#[repr(C)]
struct Marked {
    mark: [u8; 16],
    word: [u8; WORD_BYTES],
}

#[used]
static MARKED: Marked = Marked { mark: *MARK, word: *b"good............" };

fn word() -> &'static str {
    // SAFETY: a static of plain bytes. Volatile, since the file may say otherwise than the source.
    let word = unsafe { ptr::read_volatile(&raw const MARKED.word) };
    let is = |known: &&(&str, &str)| {
        let (head, tail) = word.split_at(known.0.len());
        head == known.0.as_bytes() && tail.iter().all(|byte| *byte == b'.')
    };
    WORDS.iter().find(is).map_or("good", |known| known.0)
}

/// The entry and the tables of this file's variant.
struct Variant {
    entry: Option<KvhPluginEntry>,
    fingerprints: [KvhFingerprint; ROW_COUNT],
    done: KvhOnPrefillDone1,
    grown: KvhOnGrown1,
    before: KvhBeforeAttention1,
    free: KvhOnFree1,
}

// SAFETY: it is made once and then only read; its pointers are to statics and to itself.
unsafe impl Send for Variant {}
// SAFETY: as above.
unsafe impl Sync for Variant {}

/// The entry of another variant, in this process; none in the variant that has none.
pub fn entry_of(word: &str) -> Option<&'static KvhPluginEntry> {
    make(word).entry.as_ref()
}

/// The entry; null in one variant.
pub(crate) fn entry() -> *const KvhPluginEntry {
    variant().entry.as_ref().map_or(ptr::null(), ptr::from_ref)
}

fn variant() -> &'static Variant {
    static VARIANT: OnceLock<&'static Variant> = OnceLock::new();
    VARIANT.get_or_init(|| make(word()))
}

fn make(word: &str) -> &'static Variant {
    let good = good();
    let mut fingerprints = *FINGERPRINTS.get();
    if word == "fingerprint" {
        for row in &mut fingerprints {
            // SAFETY: names in the table are static text.
            let name = unsafe { boundary::text(row.name, "name") };
            row.value += u64::from(name.is_ok_and(|name| name == "KvhPlan"));
        }
    }
    let variant = Box::leak(Box::new(Variant {
        entry: None,
        fingerprints,
        done: KvhOnPrefillDone1 {
            bound: if word == "null-bound" { None } else { good_done().bound },
            on_prefill_done: if word == "null-prefill" { None } else { Some(on_prefill_done) },
        },
        grown: KvhOnGrown1 {
            bound: good_grown().bound,
            on_grown: if word == "null-grown" { None } else { Some(on_grown) },
        },
        before: KvhBeforeAttention1 {
            before_attention: if word == "null-before" {
                None
            } else {
                good_table::<KvhBeforeAttention1>(KVH_BEFORE_ATTENTION_1).before_attention
            },
        },
        free: KvhOnFree1 {
            on_free: if word == "null-free" { None } else { good_table::<KvhOnFree1>(KVH_ON_FREE_1).on_free },
        },
    }));
    let mut entry = KvhPluginEntry {
        fingerprints: KvhArray { data: variant.fingerprints.as_ptr().cast(), ..good.fingerprints },
        hook: Some(if word == "no-hooks" { no_hook } else { hook }),
        ..*good
    };
    match word {
        "major" => entry.abi_major = 2,
        "minor" => entry.required_host_minor = KVH_ABI_MINOR + 1,
        "no-fingerprints" => entry.fingerprints.count = 0,
        "small-entry" => entry.struct_size = 8,
        "no-id" => entry.id = KvhStr::new(""),
        "bad-id" => entry.id = KvhStr { data: b"\xff\xfe".as_ptr().cast(), length: 2 },
        "other-id" => entry.id = KvhStr::new("someone-else"),
        "null-create" => entry.create = None,
        "null-destroy" => entry.destroy = None,
        "null-needs" => entry.needs = None,
        "null-hook" => entry.hook = None,
        "no-instance" => entry.create = Some(create_nothing),
        "any-table" => entry.hook = Some(any_table),
        "needs-null" => entry.needs = Some(needs_nothing),
        "needs-short" => entry.needs = Some(needs_of_any_size),
        "any-config" => entry.create = Some(create_from_anything),
        "leak" => entry.destroy = Some(destroy_not_all),
        _ => {}
    }
    if word != "null-entry" {
        variant.entry = Some(entry);
    }
    variant
}

/// The entry that the safe side makes.
fn good() -> &'static KvhPluginEntry {
    static GOOD: kvhook_abi::export::Static<KvhPluginEntry> = Tables::<Faulty>::entry();
    GOOD.get()
}

fn good_table<T>(id: &str) -> &'static T {
    let hook = good().hook.expect("the safe side gives every function");
    // SAFETY: the safe side answers these ids with their static tables.
    unsafe { hook(KvhStr::new(id)).cast::<T>().as_ref() }.expect("Faulty implements every hook point")
}

fn good_done() -> &'static KvhOnPrefillDone1 {
    good_table(KVH_ON_PREFILL_DONE_1)
}

fn good_grown() -> &'static KvhOnGrown1 {
    good_table(KVH_ON_GROWN_1)
}

unsafe extern "C" fn hook(id: KvhStr) -> *const c_void {
    let variant = variant();
    // SAFETY: the host's text.
    match unsafe { boundary::text(id, "id") } {
        Ok(KVH_ON_PREFILL_DONE_1) => (&raw const variant.done).cast(),
        Ok(KVH_ON_GROWN_1) => (&raw const variant.grown).cast(),
        Ok(KVH_BEFORE_ATTENTION_1) => (&raw const variant.before).cast(),
        Ok(KVH_ON_FREE_1) => (&raw const variant.free).cast(),
        _ => ptr::null(),
    }
}

unsafe extern "C" fn no_hook(_: KvhStr) -> *const c_void {
    ptr::null()
}

unsafe extern "C" fn create_nothing(_: *const KvhCreateArgs, _: *mut *mut KvhInstance, _: *mut KvhText) -> KvhStatus {
    KVH_OK
}

unsafe extern "C" fn any_table(_: KvhStr) -> *const c_void {
    (&raw const variant().done).cast()
}

unsafe extern "C" fn needs_nothing(_: *mut KvhInstance, _: *mut KvhNeeds, _: *mut KvhText) -> KvhStatus {
    KVH_OK
}

unsafe extern "C" fn needs_of_any_size(
    instance: *mut KvhInstance,
    needs: *mut KvhNeeds,
    error: *mut KvhText,
) -> KvhStatus {
    match good().needs {
        // SAFETY: the host's arguments, passed on.
        Some(good) if instance.is_null() || needs.is_null() => unsafe { good(instance, needs, error) },
        _ => KVH_OK,
    }
}

unsafe extern "C" fn create_from_anything(
    args: *const KvhCreateArgs,
    instance: *mut *mut KvhInstance,
    error: *mut KvhText,
) -> KvhStatus {
    let Some(good) = good().create else { return KVH_ERR_INTERNAL };
    // SAFETY: the host's arguments, passed on with an empty config.
    unsafe {
        let Some(args) = args.as_ref() else { return good(args, instance, error) };
        let args = KvhCreateArgs { config: KvhStr::new(""), ..*args };
        good(&raw const args, instance, error)
    }
}

unsafe extern "C" fn destroy_not_all(instance: *mut KvhInstance) {
    std::hint::black_box(vec![1u8; 1 << 14].leak());
    if let Some(good) = good().destroy {
        // SAFETY: the host's instance, passed on.
        unsafe { good(instance) };
    }
}

unsafe extern "C" fn on_prefill_done(
    instance: *mut KvhInstance,
    args: *const KvhPrepareArgs,
    out: *mut KvhPrepareOut,
    error: *mut KvhText,
) -> KvhStatus {
    match good_done().on_prefill_done {
        // SAFETY: the host's arguments, passed on.
        Some(good) => unsafe { damaged(good(instance, args, out, error), out) },
        None => KVH_ERR_INTERNAL,
    }
}

unsafe extern "C" fn on_grown(
    instance: *mut KvhInstance,
    args: *const KvhPrepareArgs,
    out: *mut KvhPrepareOut,
    error: *mut KvhText,
) -> KvhStatus {
    match good_grown().on_grown {
        // SAFETY: the host's arguments, passed on.
        Some(good) => unsafe { damaged(good(instance, args, out, error), out) },
        None => KVH_ERR_INTERNAL,
    }
}

/// # Safety
/// `out` is the host's, from a call that ended with `status`.
unsafe fn damaged(status: KvhStatus, out: *mut KvhPrepareOut) -> KvhStatus {
    if status == KVH_OK {
        // SAFETY: passed on from the caller.
        unsafe { damage::carry_out(out) };
    }
    status
}
