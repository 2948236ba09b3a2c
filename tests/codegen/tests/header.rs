//! The contract's header compiles alone, twice included, in C and C++, and its macros mean what they say.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use kvhook_abi::ids::KVH_META_SECTION;
use kvhook_abi::layout::{Row, Table};
use kvhook_abi::metadata::Metadata;
use object::{Object, ObjectSection};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Compiles and runs a program.
fn run(compiler: &str, standard: &str, source: &str, name: &str) {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (file, program) = (folder.join(name), folder.join(format!("{name}.out")));
    fs::write(&file, source).unwrap();
    let output = Command::new(compiler)
        .arg(format!("-std={standard}"))
        .args(["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-I"])
        .arg(root().join("hook-abi/include"))
        .arg(&file)
        .arg("-o")
        .arg(&program)
        .output()
        .unwrap_or_else(|error| panic!("{compiler}: {error}"));
    assert!(output.status.success(), "{compiler}: {}", String::from_utf8_lossy(&output.stderr));
    let status = Command::new(&program).status().unwrap();
    assert_eq!(status.code(), Some(0), "{name}: the check with this number failed");
}

const PROGRAM: &str = r#"
#include "kvhook.h"
#include "kvhook.h"

KVH_META("{\"id\":\"x\",\"layouts\":" KVH_LAYOUTS_JSON "}");

static const KvhFingerprint table[] = KVH_FINGERPRINTS;

KVH_EXPORT const KvhPluginEntry *kvh_plugin_entry_v1(void) { return 0; }

int main(void) {
    KvhRange ranges[3] = { { 1, 2 }, { 3, 4 }, { 5, 6 } };
    KvhArray every_second = { ranges, 2, 2 * sizeof(KvhRange) };
    KvhArrayMut all = { ranges, 3, sizeof(KvhRange) };
    KvhOffers offers = { offsetof(KvhOffers, block_size), 0, 0, 0 };
    if (KVH_AT(KvhRange, every_second, 1)->start != 5) return 1;
    KVH_AT_MUT(KvhRange, all, 1)->start = 9;
    if (ranges[1].start != 9) return 2;
    if (!KVH_HAS(&offers, KvhOffers, max_window_queries) || KVH_HAS(&offers, KvhOffers, block_size)) return 3;
    if (sizeof(table) / sizeof(table[0]) != KVH_FINGERPRINT_COUNT) return 4;
    if (table[0].value != KVH_FINGERPRINT_KvhStr_1 || table[0].name.length != 6) return 5;
    if (sizeof(KVH_ON_PREFILL_DONE_1) != sizeof("kvh.on_prefill_done/1")) return 6;
    if (kvh_meta.magic[7] != '1' || kvh_meta.length + 1 != sizeof(kvh_meta.text)) return 7;
    return kvh_plugin_entry_v1() == 0 ? 0 : 8;
}
"#;

#[test]
fn compiles_as_c11() {
    run("cc", "c11", PROGRAM, "header.c");
}

#[test]
fn compiles_as_cpp17() {
    run("c++", "c++17", PROGRAM, "header.cpp");
}

#[test]
fn a_c_librarys_metadata_carries_the_same_layouts() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (file, library) = (folder.join("meta.c"), folder.join("meta.so"));
    let source = r#"
#include "kvhook.h"
KVH_META("{\"id\":\"c\",\"version\":\"1\",\"abi_major\":1,\"abi_minor\":0,\"hooks\":[],\"layouts\":" KVH_LAYOUTS_JSON "}");
"#;
    fs::write(&file, source).unwrap();
    let include = root().join("hook-abi/include");
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-s", "-I"]).arg(include).arg(&file).arg("-o").arg(&library);
    assert!(compiler.status().unwrap().success());
    let bytes = fs::read(&library).unwrap();
    let library = object::File::parse(&*bytes).unwrap();
    let section = library.section_by_name(KVH_META_SECTION).unwrap();
    let metadata = Metadata::parse(section.data().unwrap()).unwrap();
    let rows: Vec<Row> = Table::current().rows.into_iter().map(|(row, _)| row).collect();
    assert_eq!(metadata.layouts, rows);
}

#[test]
fn checked_in_files_are_up_to_date() {
    kvhook_codegen::run(&root(), true).unwrap_or_else(|error| panic!("{error}"));
}
