//! The one error type of the host: a variant for each `KVHOOK_ERR_*`, with the facts in it.

use std::path::{Path, PathBuf};

use kvhook_abi::PluginError;

use crate::raw::*;

/// Why the host refused something. [`HostError::status`] is the number that crosses the C boundary, the
/// `Display` text the message: what was found, what was expected, what to do.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// An error about one plugin, with the file or name by which it was asked for.
    #[error("plugin {plugin}: {source}")]
    Plugin {
        /// Path or name.
        plugin: String,
        /// What is wrong with it; it gives the status.
        source: Box<HostError>,
    },

    /// `KVHOOK_ERR_FILE_MISSING`.
    #[error("no such file; looked for {}; install the plugin there, or add its folder to KVHOOK_PLUGIN_PATH", paths(.looked_at))]
    FileMissing {
        /// Where it was looked for, in order.
        looked_at: Vec<PathBuf>,
    },
    /// `KVHOOK_ERR_FILE_UNREADABLE`.
    #[error("cannot read {}: {problem}; expected a regular, readable file", .path.display())]
    FileUnreadable {
        /// The file.
        path: PathBuf,
        /// The system's message, or what it is instead of a file.
        problem: String,
    },
    /// `KVHOOK_ERR_PATH_NOT_ALLOWED`.
    #[error(
        "the path {} is not inside an allowed folder ({}); move the file there, or add its folder to KVHOOK_PLUGIN_PATH",
        .path.display(), paths(.folders)
    )]
    PathNotAllowed {
        /// The path as given.
        path: PathBuf,
        /// The folders that the operator allows.
        folders: Vec<PathBuf>,
    },
    /// `KVHOOK_ERR_PATH_IS_LINK`.
    #[error("{} is a symbolic link; links are not followed below the allowed folder: give the real path", .link.display())]
    PathIsLink {
        /// The component that is a link.
        link: PathBuf,
    },
    /// `KVHOOK_ERR_FILE_CHANGED`.
    #[error("{} changed between check and load ({change}); {advice}", .path.display())]
    FileChanged {
        /// The file.
        path: PathBuf,
        /// What differs.
        change: String,
        /// What to do.
        advice: &'static str,
    },
    /// `KVHOOK_ERR_NOT_ELF`.
    #[error("not an ELF shared library: {0}; expected the .so of a plugin, built as a cdylib")]
    NotElf(String),
    /// `KVHOOK_ERR_WRONG_ARCHITECTURE`.
    #[error("built for {found}; this process runs {expected}: build the plugin for that target")]
    WrongArchitecture {
        /// What the file is for.
        found: String,
        /// What is running.
        expected: String,
    },
    /// `KVHOOK_ERR_CHECKSUM`.
    #[error("its SHA-256 is {found}, but {pinned} is pinned; check where the file came from before you change the pin")]
    Checksum {
        /// Of the file's content.
        found: String,
        /// What was asked for.
        pinned: String,
    },
    /// `KVHOOK_ERR_COPY`.
    #[error("cannot make a private copy in {}: {problem}", .folder.display())]
    Copy {
        /// The copy folder.
        folder: PathBuf,
        /// What failed and what to do.
        problem: String,
    },
    /// `KVHOOK_ERR_DLOPEN`.
    #[error("the dynamic loader refused {}: {problem}; check its dependencies with `ldd`, and that the folder is not mounted noexec", .path.display())]
    Dlopen {
        /// The private copy.
        path: PathBuf,
        /// The loader's message.
        problem: String,
    },
    /// `KVHOOK_ERR_NO_ENTRY`.
    #[error("exports no symbol `kvh_plugin_entry_v1`: it is not a kvhook plugin, or its entry was not exported")]
    NoEntry,
    /// `KVHOOK_ERR_WRONG_MAJOR`.
    #[error("speaks ABI major {}; this host speaks {ours}: rebuild the plugin with kvhook-abi {ours}.x", majors(.found))]
    WrongMajor {
        /// Majors that the plugin has.
        found: Vec<u32>,
        /// Major of this host.
        ours: u32,
    },
    /// `KVHOOK_ERR_NEWER_MINOR`.
    #[error(
        "requires a host of ABI {major}.{required} or newer; this one is {major}.{ours}: update the host, or use an older plugin"
    )]
    NewerMinor {
        /// Major of both.
        major: u32,
        /// Minor that the plugin requires.
        required: u32,
        /// Minor of this host.
        ours: u32,
    },
    /// `KVHOOK_ERR_LAYOUT`.
    #[error("{0}")]
    Layout(String),
    /// `KVHOOK_ERR_NULL_FUNCTION`.
    #[error("the function `{function}` of {table} is null, but it must be there; this is a defect of the plugin")]
    NullFunction {
        /// The table: the entry, or a hook's id.
        table: String,
        /// The function's name.
        function: &'static str,
    },
    /// `KVHOOK_ERR_BAD_ENTRY`.
    #[error("its entry is not usable: {0}; this is a defect of the plugin")]
    BadEntry(String),
    /// `KVHOOK_ERR_METADATA`.
    #[error(
        "its metadata (section `.kvh_meta`) cannot be used: {0}; rebuild the plugin with the export macro, or as the C example does"
    )]
    Metadata(String),
    /// `KVHOOK_ERR_MODEL_PATH`.
    #[error(
        "a model's config names the path {plugin:?}; only bare names (letters, digits, `-`, `_`) are taken from a model: \
         let the operator configure the path"
    )]
    ModelPath {
        /// What the config says.
        plugin: String,
    },
    /// `KVHOOK_ERR_SAFE_MODE`.
    #[error("safe mode: KVHOOK_SAFE_MODE is set, so no plugin is loaded; unset it to load plugins again")]
    SafeMode,

    /// `KVHOOK_ERR_SPEC`.
    #[error("the plugin's configuration form is not valid: {0}")]
    Spec(String),
    /// `KVHOOK_ERR_CONFIG`.
    #[error("the plugin refused its config: {0}")]
    Config(String),
    /// `KVHOOK_ERR_NEED_NOT_OFFERED`.
    #[error("the plugin needs what this engine does not offer: {}", .missing.join("; "))]
    NeedNotOffered {
        /// Each missing offer, and what the engine would have to do.
        missing: Vec<String>,
    },
    /// `KVHOOK_ERR_CREATE`.
    #[error("`{function}` failed with status {status}: {message}")]
    Create {
        /// `create` or `needs`.
        function: &'static str,
        /// `KVH_ERR_*`.
        status: i32,
        /// The plugin's message.
        message: String,
    },
    /// `KVHOOK_ERR_CREATE_PANIC`.
    #[error("`{function}` panicked: {message}; this is a defect of the plugin, nothing was loaded")]
    CreatePanic {
        /// `create` or `needs`.
        function: &'static str,
        /// The panic's message.
        message: String,
    },
    /// `KVHOOK_ERR_UNSUPPORTED`.
    #[error("this model, device or dtype is not supported: {0}")]
    Unsupported(String),

    /// `KVHOOK_ERR_INVALID_ARGUMENT`.
    #[error("`{argument}` {problem}")]
    InvalidArgument {
        /// The argument's name.
        argument: &'static str,
        /// What was found and what was expected.
        problem: String,
    },
    /// `KVHOOK_ERR_INVALID_ARGUMENT`, with the argument named in the text.
    #[error("{0}")]
    Argument(String),
    /// `KVHOOK_ERR_UNKNOWN_UID`.
    #[error("no live sequence has the uid {0}: it never began, or was freed")]
    UnknownUid(u64),
    /// `KVHOOK_ERR_UNKNOWN_ARM`.
    #[error("no arm is named {name:?}; there are: {}", .known.join(", "))]
    UnknownArm {
        /// The name asked for.
        name: String,
        /// The arms that there are.
        known: Vec<String>,
    },
    /// `KVHOOK_ERR_UNKNOWN_TICKET`.
    #[error("no open ticket has the number {0}: it was never given, or is committed or dropped")]
    UnknownTicket(u64),
    /// `KVHOOK_ERR_NOT_READY`.
    #[error("ticket {0} has no verdict yet: ask `kvhook_verdict` until it is ready")]
    NotReady(u64),
    /// `KVHOOK_ERR_DROPPED`.
    #[error("ticket {ticket} was dropped, reason {reason}; the sequence stays as it is")]
    Dropped {
        /// The ticket.
        ticket: u64,
        /// `KVH_REASON_*` or `KVHOOK_REASON_*`.
        reason: i32,
    },
    /// `KVHOOK_ERR_NO_ROOM`.
    #[error("layer {layer}: rows for {needed} tokens are needed, {given} were given")]
    NoRoom {
        /// Index of the layer.
        layer: u32,
        /// Tokens that must fit.
        needed: u64,
        /// Tokens that fit.
        given: u64,
    },
    /// `KVHOOK_ERR_VIEW`.
    #[error("layer {layer}: {problem}")]
    View {
        /// Index of the layer.
        layer: u32,
        /// What was found and what was expected.
        problem: String,
    },
    /// `KVHOOK_ERR_OUT_OF_MEMORY`.
    #[error("{bytes} bytes for {what} were refused")]
    OutOfMemory {
        /// Bytes that were asked for.
        bytes: u64,
        /// What they were for.
        what: &'static str,
    },
    /// `KVHOOK_ERR_FORK_REFUSED`.
    #[error("sequence {0} cannot be forked: its plugin keeps state for it")]
    ForkRefused(u64),
    /// `KVHOOK_ERR_INTERNAL`.
    #[error("a defect of the host: {0}; please report it")]
    Internal(String),
    /// `KVHOOK_ERR_DEVICE`.
    #[error("{0}; work that was enqueued earlier may be its cause, and the device's context may be lost")]
    Device(String),
    /// `KVHOOK_ERR_BUFFER_TOO_SMALL`.
    #[error("the text needs {needed} bytes, the buffer has {given}")]
    BufferTooSmall {
        /// Bytes of the whole text.
        needed: usize,
        /// Bytes of the buffer.
        given: usize,
    },
}

impl HostError {
    /// The number that crosses the C boundary: `KVHOOK_ERR_*`.
    pub fn status(&self) -> KvhookStatus {
        match self {
            Self::Plugin { source, .. } => source.status(),
            Self::FileMissing { .. } => KVHOOK_ERR_FILE_MISSING,
            Self::FileUnreadable { .. } => KVHOOK_ERR_FILE_UNREADABLE,
            Self::PathNotAllowed { .. } => KVHOOK_ERR_PATH_NOT_ALLOWED,
            Self::PathIsLink { .. } => KVHOOK_ERR_PATH_IS_LINK,
            Self::FileChanged { .. } => KVHOOK_ERR_FILE_CHANGED,
            Self::NotElf(_) => KVHOOK_ERR_NOT_ELF,
            Self::WrongArchitecture { .. } => KVHOOK_ERR_WRONG_ARCHITECTURE,
            Self::Checksum { .. } => KVHOOK_ERR_CHECKSUM,
            Self::Copy { .. } => KVHOOK_ERR_COPY,
            Self::Dlopen { .. } => KVHOOK_ERR_DLOPEN,
            Self::NoEntry => KVHOOK_ERR_NO_ENTRY,
            Self::WrongMajor { .. } => KVHOOK_ERR_WRONG_MAJOR,
            Self::NewerMinor { .. } => KVHOOK_ERR_NEWER_MINOR,
            Self::Layout(_) => KVHOOK_ERR_LAYOUT,
            Self::NullFunction { .. } => KVHOOK_ERR_NULL_FUNCTION,
            Self::BadEntry(_) => KVHOOK_ERR_BAD_ENTRY,
            Self::Metadata(_) => KVHOOK_ERR_METADATA,
            Self::ModelPath { .. } => KVHOOK_ERR_MODEL_PATH,
            Self::SafeMode => KVHOOK_ERR_SAFE_MODE,
            Self::Spec(_) => KVHOOK_ERR_SPEC,
            Self::Config(_) => KVHOOK_ERR_CONFIG,
            Self::NeedNotOffered { .. } => KVHOOK_ERR_NEED_NOT_OFFERED,
            Self::Create { .. } => KVHOOK_ERR_CREATE,
            Self::CreatePanic { .. } => KVHOOK_ERR_CREATE_PANIC,
            Self::Unsupported(_) => KVHOOK_ERR_UNSUPPORTED,
            Self::InvalidArgument { .. } | Self::Argument(_) => KVHOOK_ERR_INVALID_ARGUMENT,
            Self::UnknownUid(_) => KVHOOK_ERR_UNKNOWN_UID,
            Self::UnknownArm { .. } => KVHOOK_ERR_UNKNOWN_ARM,
            Self::UnknownTicket(_) => KVHOOK_ERR_UNKNOWN_TICKET,
            Self::NotReady(_) => KVHOOK_ERR_NOT_READY,
            Self::Dropped { .. } => KVHOOK_ERR_DROPPED,
            Self::NoRoom { .. } => KVHOOK_ERR_NO_ROOM,
            Self::View { .. } => KVHOOK_ERR_VIEW,
            Self::OutOfMemory { .. } => KVHOOK_ERR_OUT_OF_MEMORY,
            Self::ForkRefused(_) => KVHOOK_ERR_FORK_REFUSED,
            Self::Internal(_) => KVHOOK_ERR_INTERNAL,
            Self::Device(_) => KVHOOK_ERR_DEVICE,
            Self::BufferTooSmall { .. } => KVHOOK_ERR_BUFFER_TOO_SMALL,
        }
    }

    /// The same error with the plugin named that it is about.
    pub fn about(self, plugin: impl Into<String>) -> Self {
        match self {
            Self::Plugin { .. } => self,
            source => Self::Plugin { plugin: plugin.into(), source: Box::new(source) },
        }
    }

    pub(crate) fn about_file(self, path: &Path) -> Self {
        self.about(path.display().to_string())
    }
}

/// What the contract's reader says of an argument: null, too small, misaligned, not UTF-8.
impl From<PluginError> for HostError {
    fn from(error: PluginError) -> Self {
        Self::Argument(error.to_string())
    }
}

fn paths(paths: &[PathBuf]) -> String {
    let paths: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
    if paths.is_empty() { "none".to_owned() } else { paths.join(", ") }
}

fn majors(majors: &[u32]) -> String {
    let majors: Vec<_> = majors.iter().map(u32::to_string).collect();
    majors.join(", ")
}
