//! The built library: never unloaded, one symbol, every hook point in its metadata.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;
use std::{env, fs};

use kvhook_abi::ids::{KVH_ENTRY_SYMBOL, KVH_META_SECTION};
use kvhook_abi::metadata::Metadata;
use object::elf::{DF_1_NODELETE, DT_FLAGS_1, FileHeader64};
use object::read::elf::{Dyn, ElfFile, FileHeader, SectionHeader};
use object::{Endianness, Object, ObjectSection, ObjectSymbol};

/// `cargo test` builds the package's cdylib beside the tests.
fn library() -> Vec<u8> {
    let test = env::current_exe().unwrap();
    fs::read(test.parent().map(|folder| folder.join("libkvhook_noop.so")).as_deref().unwrap_or(Path::new(""))).unwrap()
}

#[test]
fn it_is_never_unloaded() {
    let bytes = library();
    let header = FileHeader64::<Endianness>::parse(&*bytes).unwrap();
    let endian = header.endian().unwrap();
    let sections = header.sections(endian, &*bytes).unwrap();
    let (entries, _) = sections.iter().find_map(|section| section.dynamic(endian, &*bytes).unwrap()).unwrap();
    let flags = entries.iter().find(|entry| entry.tag32(endian) == Some(DT_FLAGS_1)).unwrap();
    assert_ne!(flags.val32(endian).unwrap() & DF_1_NODELETE, 0);
}

#[test]
fn its_metadata_lists_every_hook_point() {
    let bytes = library();
    let file = ElfFile::<FileHeader64<Endianness>>::parse(&*bytes).unwrap();
    let section = file.section_by_name(KVH_META_SECTION).unwrap();
    let metadata = Metadata::parse(section.data().unwrap()).unwrap();
    assert_eq!(metadata.id, "noop");
    assert_eq!(metadata.hooks, ["kvh.on_prefill_done/1", "kvh.on_grown/1", "kvh.before_attention/1", "kvh.on_free/1"]);
    assert_eq!(metadata.may_need, ["queries", "grown"]);
    let words: Vec<_> = metadata.config_schema["properties"]["observe"]["enum"].as_array().unwrap().iter().collect();
    assert_eq!(words, ["all", "prefill", "none"]);
    assert!(file.dynamic_symbols().any(|symbol| symbol.is_definition() && symbol.name() == Ok(KVH_ENTRY_SYMBOL)));
}
