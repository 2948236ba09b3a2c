//! Spreading tasks over cores.
//!
//! Threads live only as long as the call: a plugin's threads are gone when its hook returns. Starting one costs some
//! tens of microseconds, so a call with little to do stays on its thread.

use std::num::NonZero;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;

/// Bytes below which another thread costs more than it saves.
pub const BYTES_PER_THREAD: usize = 1 << 20;

/// Threads worth using for `tasks` tasks that touch `bytes` bytes in all: at most one a core, a task, a mebibyte.
pub fn threads_for(tasks: usize, bytes: usize) -> usize {
    static CORES: OnceLock<usize> = OnceLock::new();
    let cores = *CORES.get_or_init(|| thread::available_parallelism().map_or(1, NonZero::get));
    cores.min(tasks).min(bytes / BYTES_PER_THREAD).max(1)
}

/// Runs `f` on each task, on as many threads as [`threads_for`] says. See [`for_each_on`].
///
/// # Errors
/// As [`for_each_on`].
pub fn for_each<T, E, F>(tasks: Vec<T>, bytes: usize, f: F) -> Result<(), E>
where
    T: Send,
    E: Send,
    F: Fn(T) -> Result<(), E> + Sync,
{
    let threads = threads_for(tasks.len(), bytes);
    for_each_on(threads, tasks, f)
}

/// Runs `f` on each task, on `threads` threads, the calling one among them; returns when all are done.
///
/// Tasks start in their order, each on whichever thread is free. A task may own what it writes (a part of an output
/// slice), so results do not depend on the number of threads. Where the system refuses a thread, fewer do the work.
///
/// # Errors
/// All tasks run, whether others fail or not; the error is that of the first one, by order, that failed.
///
/// # Panics
/// When a task panics, after the other threads have ended.
pub fn for_each_on<T, E, F>(threads: usize, tasks: Vec<T>, f: F) -> Result<(), E>
where
    T: Send,
    E: Send,
    F: Fn(T) -> Result<(), E> + Sync,
{
    let queue = Mutex::new(tasks.into_iter().enumerate());
    let first_error: Mutex<Option<(usize, E)>> = Mutex::new(None);
    let work = || {
        loop {
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((order, task)) = next else { break };
            if let Err(error) = f(task) {
                let mut first = first_error.lock().unwrap_or_else(PoisonError::into_inner);
                if first.as_ref().is_none_or(|(earlier, _)| order < *earlier) {
                    *first = Some((order, error));
                }
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads {
            if thread::Builder::new().spawn_scoped(scope, work).is_err() {
                break;
            }
        }
        work();
    });
    match first_error.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some((_, error)) => Err(error),
        None => Ok(()),
    }
}
