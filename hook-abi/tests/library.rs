//! The example as a built library: its metadata survives `strip`, and it exports one symbol.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use kvhook_abi::metadata::Metadata;
use object::{Object, ObjectSection, ObjectSymbol};

/// `cargo test` builds examples beside the tests.
fn example() -> PathBuf {
    let test = env::current_exe().unwrap();
    let profile = test.parent().and_then(Path::parent).unwrap();
    let library = profile.join("examples/libvalue_norm.so");
    assert!(library.exists(), "{library:?} is missing: run `cargo test -p kvhook-abi` or `cargo build --examples`");
    library
}

#[test]
fn metadata_survives_strip() {
    let stripped = Path::new(env!("CARGO_TARGET_TMPDIR")).join("libvalue_norm_stripped.so");
    fs::copy(example(), &stripped).unwrap();
    assert!(Command::new("strip").arg("--strip-all").arg(&stripped).status().unwrap().success());
    let bytes = fs::read(&stripped).unwrap();
    let file = object::File::parse(&*bytes).unwrap();
    let section = file.section_by_name(kvhook_abi::KVH_META_SECTION).unwrap();
    let metadata = Metadata::parse(section.data().unwrap()).unwrap();
    assert_eq!((metadata.id.as_str(), metadata.language.as_str()), ("value_norm", "rust"));
    assert!(metadata.compiler.starts_with("rustc 1."), "{}", metadata.compiler);
    assert_eq!(metadata.hooks, ["kvh.on_prefill_done/1", "kvh.on_grown/1"]);
    assert_eq!(metadata.may_need, ["grown"]);
    let keys = metadata.config_schema["properties"].as_object().unwrap();
    assert!(keys.contains_key("budget") && keys.contains_key("key_weight"), "{keys:?}");
    let exported: Vec<_> = file.dynamic_symbols().filter(|symbol| symbol.is_definition()).collect();
    let names: Vec<_> = exported.iter().map(|symbol| symbol.name().unwrap()).collect();
    let deep = cfg!(feature = "abi-stable").then_some(kvhook_abi::KVH_RUST_LAYOUT_SYMBOL);
    assert_eq!(names.len(), 1 + usize::from(deep.is_some()), "{names:?}");
    assert!(names.contains(&kvhook_abi::KVH_ENTRY_SYMBOL) && deep.is_none_or(|deep| names.contains(&deep)));
}

#[test]
fn the_example_is_at_most_40_lines() {
    let source = include_str!("../examples/value_norm.rs");
    let lines = source.lines().filter(|line| !line.trim().is_empty() && !line.trim_start().starts_with("//"));
    assert!(lines.count() <= 40);
}

#[cfg(feature = "abi-stable")]
#[test]
fn the_deep_check_passes_on_a_library_of_this_build() {
    // SAFETY: our own example; loading it runs no code of ours, and it is never unloaded.
    let library = core::mem::ManuallyDrop::new(unsafe { libloading::Library::new(example()) }.unwrap());
    // SAFETY: only the symbol's address is used.
    let symbol = unsafe { library.get::<*const core::ffi::c_void>(kvhook_abi::KVH_RUST_LAYOUT_SYMBOL) }.unwrap();
    // SAFETY: the address of that symbol, in a library that stays.
    assert_eq!(unsafe { kvhook_abi::deep::deep_check(symbol.try_as_raw_ptr().unwrap()) }, Ok(()));
}
