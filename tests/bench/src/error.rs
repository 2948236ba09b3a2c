//! Errors.

/// Why a benchmark cannot run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The engine's.
    #[error(transparent)]
    Engine(#[from] kvhook_engine::Error),
    /// A function of the host's or a plugin's refused.
    #[error("{function} answered {status}: {message}")]
    Refused {
        /// The function.
        function: &'static str,
        /// Its status.
        status: i32,
        /// Its message.
        message: String,
    },
    /// The system's loader refused a plugin.
    #[error("the plugin cannot be loaded: {0}")]
    Load(#[from] libloading::Error),
    /// A view that the kernels refuse.
    #[error(transparent)]
    Kernel(#[from] kvhook_kernels::KernelError),
    /// A weight file that cannot be read or written.
    #[error(transparent)]
    Weights(#[from] kvhook_mlp_weights::WeightsError),
    /// A trained linear map that is not one.
    #[error("{path}: {problem}; expected what train.py writes with --linear-out")]
    LinearMap {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Results that cannot be written as JSON.
    #[error("the results cannot be written: {0}")]
    Json(#[from] serde_json::Error),
    /// A folder or file that cannot be read or written.
    #[error("{path}: {source}")]
    File {
        /// Its path.
        path: std::path::PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A text without room for the passages.
    #[error(
        "{text} has {found} tokens, too few for {wanted} passages of {prompt} + {scored} with scored tokens of their \
         own: give longer texts or fewer passages"
    )]
    ShortText {
        /// Its name.
        text: String,
        /// Its tokens.
        found: usize,
        /// Passages.
        wanted: usize,
        /// Tokens of a passage that are prompt.
        prompt: usize,
        /// Tokens of a passage that are scored.
        scored: usize,
    },
    /// An arm that did something else than it was asked for.
    #[error("arm {arm}: {problem}")]
    Arm {
        /// Its name.
        arm: String,
        /// What was found and what was expected.
        problem: String,
    },
    /// A thread that stopped.
    #[error("a thread of the benchmark stopped without a result")]
    Thread,
    /// A plugin without a function that the benchmark measures.
    #[error("the plugin has no {0}: build it from this workspace")]
    Missing(&'static str),
}

/// With this crate's error.
pub type Result<T> = std::result::Result<T, Error>;

/// A benchmark's end: an error is printed.
pub fn exit(outcome: Result<crate::measure::Gates>) -> std::process::ExitCode {
    match outcome {
        Ok(gates) => gates.exit(),
        Err(error) => {
            eprintln!("error: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}
