//! The smallest plugin file: an ELF header, a dynamic symbol and a metadata section. Nothing in it can run.

use kvhook_abi::ids::{KVH_ENTRY_SYMBOL, KVH_META_SECTION};

const HEADER: usize = 64;
const SECTION_HEADER: usize = 64;

/// Section types of the ELF specification.
const PROGBITS: u32 = 1;
const STRTAB: u32 = 3;
const DYNSYM: u32 = 11;

/// A shared library for this processor with `metadata` as its metadata section.
pub fn plugin(metadata: &[u8]) -> Vec<u8> {
    let symbol_names = [b"\0", KVH_ENTRY_SYMBOL.as_bytes(), b"\0"].concat();
    let mut symbols = vec![0u8; 24];
    // Name 1, a global function of section 1, at address 0x1000, of 16 bytes.
    symbols.extend([1u32.to_le_bytes().as_slice(), &[0x12, 0], &1u16.to_le_bytes()].concat());
    symbols.extend([0x1000u64.to_le_bytes(), 16u64.to_le_bytes()].concat());
    let section_names = [b"\0", KVH_META_SECTION.as_bytes(), b"\0.dynsym\0.dynstr\0.shstrtab\0"].concat();
    let name = |name: &str| {
        let found = section_names.windows(name.len()).position(|window| window == name.as_bytes());
        found.unwrap_or_default() as u32
    };
    // Name, type, content, section that it links to, size of an entry.
    let sections: [(u32, u32, &[u8], u32, u64); 5] = [
        (0, 0, &[], 0, 0),
        (name(KVH_META_SECTION), PROGBITS, metadata, 0, 0),
        (name(".dynsym"), DYNSYM, &symbols, 3, 24),
        (name(".dynstr"), STRTAB, &symbol_names, 0, 0),
        (name(".shstrtab"), STRTAB, &section_names, 0, 0),
    ];

    let mut contents = Vec::new();
    let mut headers = Vec::new();
    for (name, kind, content, link, entry) in sections {
        contents.resize(contents.len().next_multiple_of(8), 0);
        let offset = HEADER + contents.len();
        contents.extend(content);
        headers.extend([name.to_le_bytes(), kind.to_le_bytes()].concat());
        headers.extend([0u64, 0, offset as u64, content.len() as u64].map(u64::to_le_bytes).concat());
        headers.extend([link.to_le_bytes(), u32::from(kind == DYNSYM).to_le_bytes()].concat());
        headers.extend([8, entry].map(u64::to_le_bytes).concat());
    }
    contents.resize(contents.len().next_multiple_of(8), 0);

    let machine: u16 = if cfg!(target_arch = "aarch64") { 183 } else { 62 };
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    // A shared library.
    file.extend([3u16.to_le_bytes(), machine.to_le_bytes()].concat());
    file.extend(1u32.to_le_bytes());
    file.extend([0, 0, (HEADER + contents.len()) as u64].map(u64::to_le_bytes).concat());
    file.extend(0u32.to_le_bytes());
    let counts = [HEADER as u16, 0, 0, SECTION_HEADER as u16, sections.len() as u16, 4];
    file.extend(counts.map(u16::to_le_bytes).concat());
    file.extend(contents);
    file.extend(headers);
    file
}
