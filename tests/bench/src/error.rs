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
