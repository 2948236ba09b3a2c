//! How many instances this library made and destroyed, by its own count.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

static CREATED: AtomicU64 = AtomicU64::new(0);
static DESTROYED: AtomicU64 = AtomicU64::new(0);

/// Part of an instance.
pub(crate) struct Counted(());

impl Counted {
    pub(crate) fn new() -> Self {
        CREATED.fetch_add(1, SeqCst);
        Self(())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        DESTROYED.fetch_add(1, SeqCst);
    }
}

/// Instances that were made.
#[unsafe(no_mangle)]
pub extern "C" fn kvhook_faulty_created() -> u64 {
    CREATED.load(SeqCst)
}

/// Instances that were destroyed.
#[unsafe(no_mangle)]
pub extern "C" fn kvhook_faulty_destroyed() -> u64 {
    DESTROYED.load(SeqCst)
}
