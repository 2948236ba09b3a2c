//! What the file says before any of its code runs: header, exported symbols, metadata section.

use kvhook_abi::ids::{KVH_ENTRY_SYMBOL, KVH_META_SECTION};
use kvhook_abi::raw::KVH_ABI_MAJOR;
use object::LittleEndian;
use object::elf;
use object::read::elf::{FileHeader, SectionHeader, SectionTable, Sym};

use super::step::Step;
use crate::error::HostError;

type Header = elf::FileHeader64<LittleEndian>;
type Sections<'data> = SectionTable<'data, Header>;

/// `e_machine` of this process.
const OUR_MACHINE: u16 = if cfg!(target_arch = "x86_64") {
    elf::EM_X86_64
} else if cfg!(target_arch = "aarch64") {
    elf::EM_AARCH64
} else if cfg!(target_arch = "riscv64") {
    elf::EM_RISCV
} else {
    elf::EM_NONE
};

/// Checks that the bytes are a plugin for this process; gives its metadata section. Any bytes are safe.
///
/// # Errors
/// `NotElf`, `WrongArchitecture`, `WrongMajor`, `NoEntry`, `Metadata`.
pub(super) fn metadata_section<'data>(
    bytes: &'data [u8],
    passed: &mut dyn FnMut(Step),
) -> Result<&'data [u8], HostError> {
    let header = shared_library(bytes, passed)?;
    let malformed = |error: object::Error| HostError::NotElf(error.to_string());
    let sections = header.sections(LittleEndian, bytes).map_err(malformed)?;
    check_entry_symbol(&sections, bytes)?;
    passed(Step::EntrySymbol);

    let (_, section) = sections
        .section_by_name(LittleEndian, KVH_META_SECTION.as_bytes())
        .ok_or_else(|| HostError::Metadata("there is no such section".into()))?;
    section.data(LittleEndian, bytes).map_err(|error| HostError::Metadata(error.to_string()))
}

fn shared_library<'data>(bytes: &'data [u8], passed: &mut dyn FnMut(Step)) -> Result<&'data Header, HostError> {
    let ident = bytes.get(..16).ok_or_else(|| HostError::NotElf(format!("it has only {} bytes", bytes.len())))?;
    if ident[..4] != elf::ELFMAG {
        return Err(HostError::NotElf(format!("it begins with {:02x?}, not with {:02x?}", &ident[..4], elf::ELFMAG)));
    }
    let foreign = |found: String| HostError::WrongArchitecture {
        found,
        expected: format!("64-bit little-endian {}", machine_name(OUR_MACHINE)),
    };
    if ident[4] != elf::ELFCLASS64 {
        passed(Step::Elf);
        return Err(foreign("a processor that is not 64-bit".into()));
    }
    if ident[5] != elf::ELFDATA2LSB {
        passed(Step::Elf);
        return Err(foreign("a processor that is not little-endian".into()));
    }
    let header = Header::parse(bytes).map_err(|error| HostError::NotElf(error.to_string()))?;
    let kind = header.e_type(LittleEndian);
    if kind != elf::ET_DYN {
        let name = match kind {
            elf::ET_REL => "an object file",
            elf::ET_EXEC => "a program",
            elf::ET_CORE => "a core dump",
            _ => "of an unknown type",
        };
        return Err(HostError::NotElf(format!("it is {name} (e_type {kind})")));
    }
    passed(Step::Elf);
    let machine = header.e_machine(LittleEndian);
    if machine != OUR_MACHINE {
        return Err(foreign(machine_name(machine)));
    }
    passed(Step::Architecture);
    Ok(header)
}

fn machine_name(machine: u16) -> String {
    match machine {
        elf::EM_X86_64 => "x86-64".into(),
        elf::EM_AARCH64 => "AArch64".into(),
        elf::EM_RISCV => "RISC-V".into(),
        other => format!("machine {other}"),
    }
}

/// The entry of our major version must be exported; otherwise says which majors are.
fn check_entry_symbol(sections: &Sections<'_>, bytes: &[u8]) -> Result<(), HostError> {
    let malformed = |error: object::Error| HostError::NotElf(error.to_string());
    let symbols = sections.symbols(LittleEndian, bytes, elf::SHT_DYNSYM).map_err(malformed)?;
    // `kvh_plugin_entry_v1` without its number.
    let prefix = KVH_ENTRY_SYMBOL.trim_end_matches(|c: char| c.is_ascii_digit());
    let mut found = Vec::new();
    for symbol in symbols.iter().filter(|symbol| symbol.is_definition(LittleEndian)) {
        let Ok(name) = symbol.name(LittleEndian, symbols.strings()) else { continue };
        let Some(major) = name.strip_prefix(prefix.as_bytes()) else { continue };
        found.extend(std::str::from_utf8(major).ok().and_then(|major| major.parse::<u32>().ok()));
    }
    if found.contains(&KVH_ABI_MAJOR) {
        return Ok(());
    }
    found.sort_unstable();
    found.dedup();
    Err(if found.is_empty() { HostError::NoEntry } else { HostError::WrongMajor { found, ours: KVH_ABI_MAJOR } })
}

/// Names that a shared library takes from other ones. Any bytes are safe.
///
/// # Errors
/// `NotElf`, `WrongArchitecture`.
pub fn imports(bytes: &[u8]) -> Result<Vec<String>, HostError> {
    let header = shared_library(bytes, &mut |_| ())?;
    let malformed = |error: object::Error| HostError::NotElf(error.to_string());
    let sections = header.sections(LittleEndian, bytes).map_err(malformed)?;
    let symbols = sections.symbols(LittleEndian, bytes, elf::SHT_DYNSYM).map_err(malformed)?;
    let name = |symbol: &elf::Sym64<LittleEndian>| symbol.name(LittleEndian, symbols.strings()).ok();
    let missing = symbols.iter().filter(|symbol| symbol.is_undefined(LittleEndian));
    let names = missing.filter_map(name).map(|name| String::from_utf8_lossy(name).into_owned());
    Ok(names.filter(|name| !name.is_empty()).collect())
}
