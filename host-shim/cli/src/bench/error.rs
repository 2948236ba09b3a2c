//! Why a benchmark could not be run.

/// Why a benchmark could not be run. Each message says what was found and what to do.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The program has no code for CUDA devices.
    #[error("this kvhook was built without CUDA; build it with `--features cuda`, or take `--device cpu`")]
    BuiltWithoutCuda,
    /// There is no driver or no device.
    #[error("no CUDA device can be used: {0}; take `--device cpu`")]
    NoDevice(String),
    /// A call of the driver failed.
    #[error("the CUDA driver says `{answer}` to {call}; nothing that was measured before is wrong")]
    Driver {
        /// What was called for.
        call: &'static str,
        /// Its answer.
        answer: String,
    },
    /// An operation of the kernels failed.
    #[error("{operation} failed: {answer}")]
    Kernel {
        /// The operation.
        operation: &'static str,
        /// What it said.
        answer: String,
    },
    /// No row has all the words.
    #[error("no row has all words of `{filter}`; rows are named as in `{example}`, and words are compared whole")]
    NoRows {
        /// The filter.
        filter: String,
        /// Name of a row.
        example: String,
    },
    /// A plugin kept the sequence as it is.
    #[error("the plugin kept the sequence of {tokens} tokens ({reason}); expected a compression")]
    Kept {
        /// Tokens of the sequence.
        tokens: usize,
        /// The reason's name.
        reason: &'static str,
    },
    /// A verdict did not come.
    #[error("no verdict came within {seconds} s; the device may be lost, or shared with a program that blocks it")]
    NoVerdict {
        /// How long was waited.
        seconds: u64,
    },
    /// A cache does not fit.
    #[error("{bytes} bytes of memory cannot be had; leave the row out with --rows, or free memory")]
    Memory {
        /// Bytes asked for.
        bytes: usize,
    },
    /// The host refused something.
    #[error(transparent)]
    Host(#[from] kvhook_host::HostError),
    /// The weights for mlp-decouple could not be made.
    #[error("weights for mlp-decouple cannot be written to the folder for temporary files: {0}")]
    Weights(String),
    /// A row could not be measured.
    #[error("row `{row}`: {source}")]
    Row {
        /// Name of the row.
        row: String,
        /// Why.
        source: Box<BenchError>,
    },
    /// Some rows could not be measured.
    #[error("{failed} of {of} rows could not be measured; the first is `{row}`: {why}")]
    Failed {
        /// How many.
        failed: usize,
        /// Of how many.
        of: usize,
        /// Name of the first.
        row: String,
        /// Why.
        why: String,
    },
    /// A file of peers is not one.
    #[error("{path} holds no peers' times: {source}; write it with tests/peers/peers.py")]
    NotPeers {
        /// The file.
        path: std::path::PathBuf,
        /// What the JSON reader said.
        source: serde_json::Error,
    },
    /// A file of peers was written in another format.
    #[error("{path} has format {found}, this kvhook reads {expected}; write it anew with tests/peers/peers.py")]
    PeersFormat {
        /// The file.
        path: std::path::PathBuf,
        /// Format number in the file.
        found: u32,
        /// Format number that this version reads.
        expected: u32,
    },
}
