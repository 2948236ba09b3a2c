//! Where logs go.

use tracing_subscriber::EnvFilter;

/// Prints the logs of engine, host and plugins to standard error: warnings, with `verbose` 1 what happens, with 2 and
/// more all details. The environment variable `RUST_LOG` takes precedence.
pub fn print_to_stderr(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "info",
        _ => "debug",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(format!("kvhook={level}")));
    // Fails only where logs are printed already, which is what is wanted.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .without_time()
        .try_init();
}
