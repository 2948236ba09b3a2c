//! The steps of loading a plugin, in order.

use serde::Serialize;

/// One thing that is checked when a plugin is loaded. A load stops at the first that fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Safe mode is off, the name or path is allowed, no link is followed, the file is there and regular.
    Open,
    /// It was read whole, and did not change meanwhile.
    Read,
    /// Its SHA-256 is the pinned one, if one is.
    Pin,
    /// It is an ELF shared library.
    Elf,
    /// It is built for this processor.
    Architecture,
    /// It exports the entry symbol of our major version.
    EntrySymbol,
    /// Its metadata can be read.
    Metadata,
    /// Its metadata says our major version, and requires no newer minor.
    Version,
    /// The layouts in its metadata are ones that we know.
    Layouts,
    /// The private copy is written, or was there unchanged.
    Copy,
    /// The dynamic loader took it.
    Dlopen,
    /// The entry is there and large enough, its texts are UTF-8.
    Entry,
    /// The entry says our major version, and requires no newer minor.
    EntryVersion,
    /// The layouts in the entry are ones that we know.
    Fingerprints,
    /// No function of the entry or of a hook's table is null.
    Functions,
    /// Entry and metadata agree.
    Agreement,
    /// The second layout check, with feature `abi-stable` and where the plugin has it too.
    DeepLayout,
}

impl Step {
    /// All steps, in order.
    pub const ALL: [Self; 17] = [
        Self::Open,
        Self::Read,
        Self::Pin,
        Self::Elf,
        Self::Architecture,
        Self::EntrySymbol,
        Self::Metadata,
        Self::Version,
        Self::Layouts,
        Self::Copy,
        Self::Dlopen,
        Self::Entry,
        Self::EntryVersion,
        Self::Fingerprints,
        Self::Functions,
        Self::Agreement,
        Self::DeepLayout,
    ];

    /// What a passed step says.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Open => "the path is allowed and leads to a regular file without links",
            Self::Read => "the file was read whole and hashed",
            Self::Pin => "the content is the pinned one, or none is pinned",
            Self::Elf => "the file is an ELF shared library",
            Self::Architecture => "it is built for this processor",
            Self::EntrySymbol => "it exports kvh_plugin_entry_v1",
            Self::Metadata => "its metadata can be read",
            Self::Version => "its metadata says an ABI version that this host speaks",
            Self::Layouts => "every layout in its metadata is known here",
            Self::Copy => "the private copy is in place",
            Self::Dlopen => "the dynamic loader took it",
            Self::Entry => "its entry is usable",
            Self::EntryVersion => "its entry says an ABI version that this host speaks",
            Self::Fingerprints => "every layout in its entry is known here",
            Self::Functions => "no function is null",
            Self::Agreement => "entry and metadata agree",
            Self::DeepLayout => "the deep layout check found nothing, or host or plugin was built without it",
        }
    }
}
