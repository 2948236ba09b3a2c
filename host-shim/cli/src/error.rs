//! Why a command failed, and the exit code that tells.

use std::path::PathBuf;

use kvhook_host::HostError;
use kvhook_host::raw::{KVHOOK_ERR_FILE_MISSING, KVHOOK_ERR_FILE_UNREADABLE};
use kvhook_mlp_weights::WeightsError;

use crate::bench::error::BenchError;

/// Exit code when a command did its work and the answer is no: a check of `inspect` failed, a rule of `validate` is broken,
/// or the plugin of `eval` failed.
pub const EXIT_CHECK_FAILED: u8 = 1;
/// Exit code of a wrong command line, also used by clap, and of files that cannot be used.
pub const EXIT_USAGE: u8 = 2;
/// Exit code when this machine lacks something: pip, a network, a cache folder, a device.
pub const EXIT_MISSING: u8 = 3;
/// Exit code when a plugin or a model could not be loaded or run.
pub const EXIT_ENGINE: u8 = 4;
/// Exit code when a result could not be written.
pub const EXIT_OUTPUT: u8 = 5;

/// Why a command failed. Each message says what was found and what to do.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// An input file could not be read.
    #[error("cannot read {path}: {source}; check the path and its permissions")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// An input file is not UTF-8.
    #[error("{path} is not UTF-8 text (byte {at} is wrong); convert it, for example with iconv -t UTF-8")]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Offset of the first wrong byte.
        at: usize,
    },
    /// Two arms share a name.
    #[error("two arms are named `{0}`; give each --arm a name of its own")]
    DuplicateArm(String),
    /// The texts are too short for the passages asked for.
    #[error(
        "the texts hold {found} passages of {length} tokens, {wanted} were asked for; \
         give more --text, or a smaller --passages, --prefix or --continuation"
    )]
    TooLittleText {
        /// Passages that fit.
        found: usize,
        /// Passages asked for.
        wanted: usize,
        /// Tokens of one passage, prefix and continuation.
        length: usize,
    },
    /// A results file is not what `compare` writes.
    #[error("{path} is not a results file of kvhook: {source}; write it anew with `kvhook compare --json`")]
    NotResults {
        /// The file.
        path: PathBuf,
        /// What the JSON reader said.
        source: serde_json::Error,
    },
    /// A results file was written in another format.
    #[error("the results have format {found}, this kvhook reads format {expected}; run the comparison again")]
    ResultsFormat {
        /// Format number in the file.
        found: u32,
        /// Format number that this version reads.
        expected: u32,
    },
    /// The engine cannot do what was asked: the model cannot be fetched, loaded or run.
    #[error(transparent)]
    Engine(#[from] kvhook_engine::Error),
    /// A plugin cannot be loaded, or refuses its config.
    #[error("arm `{name}`: {source}")]
    Arm {
        /// The arm.
        name: String,
        /// What the host said.
        source: kvhook_engine::Error,
    },
    /// The share to keep does not go with the plugin or its config.
    #[error("{0}")]
    Keep(String),
    /// The plugin of `eval` left its first prompt as it was.
    #[error(
        "`{name}` compressed nothing of a prompt of {rows} tokens, so there is nothing to evaluate: {why}; \
         docs/errors.md says what the reasons mean, and `kvhook run -vv` shows what the plugin logs"
    )]
    NothingCompressed {
        /// The plugin's arm.
        name: String,
        /// Tokens of the prompt.
        rows: usize,
        /// The host's reasons.
        why: String,
    },
    /// A file of prompts cannot be used.
    #[error("{path}, line {line}: {what}; a line holds a prompt, as it stands or as a JSON string")]
    Prompts {
        /// The file.
        path: PathBuf,
        /// Number of the line.
        line: usize,
        /// What is wrong with it.
        what: String,
    },
    /// A record has no line that counts.
    #[error("{path} is no record of kvhook: {why}; docs/report.md has the format")]
    EmptyRecord {
        /// The file.
        path: PathBuf,
        /// The first thing that is wrong with it.
        why: String,
    },
    /// The arm to compare with is in no part of the record.
    #[error("{path} has no arm `{name}`; `kvhook report` without --against lists the arms")]
    NoSuchArm {
        /// The name.
        name: String,
        /// The record.
        path: PathBuf,
    },
    /// A file is not a plugin.
    #[error(transparent)]
    Plugin(HostError),
    /// What was to be validated is not a plugin at all.
    #[error("`{plugin}` cannot be validated: {source}")]
    NotAPlugin {
        /// The plugin as it was named.
        plugin: String,
        /// What the host said.
        source: HostError,
    },
    /// A plugin's rules cannot be checked.
    #[error("{0}")]
    Validate(String),
    /// A weight file or checkpoint cannot be used.
    #[error("{}: {source}", path.display())]
    Weights {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: Box<WeightsError>,
    },
    /// The file of `--terms` is not such an object.
    #[error("{path} does not say what weights were trained for: {source}; docs/mlp-weights.md has the fields")]
    Terms {
        /// The file.
        path: PathBuf,
        /// What the JSON reader said.
        source: serde_json::Error,
    },
    /// The folder of a new project is there.
    #[error("{} exists, and nothing in it was changed; choose another name, or move it away", path.display())]
    ProjectExists {
        /// The folder, or whatever has its name.
        path: PathBuf,
    },
    /// A benchmark could not be run.
    #[error(transparent)]
    Bench(#[from] BenchError),
    /// A result could not be written.
    #[error("cannot write {path}: {source}; choose a writable place")]
    Write {
        /// The file, or `standard output`.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl CliError {
    /// Exit code of the process, one of the `EXIT_` constants.
    pub fn exit_code(&self) -> u8 {
        use kvhook_engine::Error;
        match self {
            Self::Weights { source, .. } if matches!(**source, WeightsError::Write { .. }) => EXIT_OUTPUT,
            Self::Read { .. }
            | Self::Weights { .. }
            | Self::Terms { .. }
            | Self::NotUtf8 { .. }
            | Self::DuplicateArm(_)
            | Self::Keep(_)
            | Self::Prompts { .. }
            | Self::EmptyRecord { .. }
            | Self::NoSuchArm { .. }
            | Self::ProjectExists { .. }
            | Self::NotAPlugin { .. }
            | Self::Validate(_)
            | Self::TooLittleText { .. }
            | Self::NotResults { .. }
            | Self::ResultsFormat { .. }
            | Self::Engine(Error::Io { .. } | Error::Config { .. } | Error::Empty { .. } | Error::ContextFull { .. }) => {
                EXIT_USAGE
            }
            Self::Plugin(error) if [KVHOOK_ERR_FILE_MISSING, KVHOOK_ERR_FILE_UNREADABLE].contains(&error.status()) => {
                EXIT_USAGE
            }
            Self::Bench(BenchError::NoRows { .. } | BenchError::NotPeers { .. } | BenchError::PeersFormat { .. }) => {
                EXIT_USAGE
            }
            Self::Engine(Error::Fetch { .. } | Error::Device { .. })
            | Self::Bench(BenchError::NoDevice(_) | BenchError::BuiltWithoutCuda | BenchError::Memory { .. }) => {
                EXIT_MISSING
            }
            Self::Bench(BenchError::Weights(_)) => EXIT_OUTPUT,
            Self::Bench(_) | Self::Engine(_) | Self::Arm { .. } | Self::Plugin(_) => EXIT_ENGINE,
            Self::NothingCompressed { .. } => EXIT_CHECK_FAILED,
            Self::Write { .. } => EXIT_OUTPUT,
        }
    }
}
