//! Plugin files before any of their code runs: any bytes as a file, as a metadata section, and as the section of a file that
//! is otherwise good. The section of the file must say what the section alone says.

#![no_main]

use kvhook_abi::metadata::{HEAD, Metadata};
use kvhook_fuzz::elf;
use kvhook_host::load::{Inspection, inspect_bytes};
use libfuzzer_sys::fuzz_target;

fn inspect(bytes: &[u8]) -> Option<Inspection> {
    match inspect_bytes(bytes) {
        Ok(inspection) => {
            assert_eq!(inspection.bytes, bytes.len() as u64);
            assert!(serde_json::to_string(&inspection).is_ok());
            Some(inspection)
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            None
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    inspect(bytes);
    let alone = Metadata::parse(bytes);
    let in_file = inspect(&elf::plugin(bytes));
    let Ok(alone) = alone else { return assert!(in_file.is_none(), "a broken section was read from a file") };
    let in_file = in_file.expect("a good section was not read from a file");
    assert_eq!((&alone.id, &alone.version, &alone.hooks), (&in_file.id, &in_file.version, &in_file.hooks));
    assert_eq!((alone.abi_major, alone.abi_minor), (in_file.abi_major, in_file.abi_minor));
    assert_eq!(alone.config_schema, in_file.config_schema);
    for row in &alone.layouts {
        let same = |other: &&kvhook_host::load::LayoutComparison| {
            (&other.name, other.generation) == (&row.name, row.generation)
        };
        assert!(in_file.layouts.iter().any(|other| same(&other)), "{} is missing", row.name);
    }
    // What stands behind the section's stated length is not read; what stands before is needed.
    let length = u32::from_le_bytes([bytes[HEAD - 4], bytes[HEAD - 3], bytes[HEAD - 2], bytes[HEAD - 1]]) as usize;
    assert_eq!(Metadata::parse(&bytes[..HEAD + length]).map(|read| read.id).ok(), Some(alone.id));
    assert!(Metadata::parse(&bytes[..HEAD + length - 1]).is_err());
});
