//! Locks and flags of arms, sequences and tickets.
//!
//! With the feature `model` they are loom's, which runs a test again for every order in which threads can come to them, and
//! for every value that a relaxed load may see: `tests/model.rs`.

#[cfg(not(feature = "model"))]
pub use parking_lot::{Mutex, MutexGuard, RwLock};
#[cfg(not(feature = "model"))]
pub use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64};

#[cfg(feature = "model")]
pub use loom::sync::MutexGuard;
#[cfg(feature = "model")]
pub use loom::sync::atomic::{AtomicBool, AtomicU8, AtomicU64};
#[cfg(feature = "model")]
pub use modelled::{Mutex, RwLock};

/// Gives a lock to who waits for it, if anybody does.
#[cfg(not(feature = "model"))]
pub fn unlock_fairly<T>(guard: MutexGuard<'_, T>) {
    MutexGuard::unlock_fair(guard);
}

/// Gives a lock to anybody: loom tries them all.
#[cfg(feature = "model")]
pub fn unlock_fairly<T>(guard: MutexGuard<'_, T>) {
    drop(guard);
}

/// loom's locks with the names and answers of `parking_lot`'s.
#[cfg(feature = "model")]
mod modelled {
    use loom::sync;

    /// A lock for one.
    #[derive(Default)]
    pub struct Mutex<T>(sync::Mutex<T>);

    impl<T> Mutex<T> {
        /// A lock around a value.
        pub fn new(value: T) -> Self {
            Self(sync::Mutex::new(value))
        }

        /// Waits until nobody else has it.
        pub fn lock(&self) -> sync::MutexGuard<'_, T> {
            self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
        }

        /// Whether somebody has it now.
        pub fn is_locked(&self) -> bool {
            self.0.try_lock().is_err()
        }
    }

    impl<T> From<T> for Mutex<T> {
        fn from(value: T) -> Self {
            Self::new(value)
        }
    }

    /// A lock for one that writes, or many that read.
    #[derive(Default)]
    pub struct RwLock<T>(sync::RwLock<T>);

    impl<T> RwLock<T> {
        /// A lock around a value.
        pub fn new(value: T) -> Self {
            Self(sync::RwLock::new(value))
        }

        /// Waits until nobody writes.
        pub fn read(&self) -> sync::RwLockReadGuard<'_, T> {
            self.0.read().unwrap_or_else(std::sync::PoisonError::into_inner)
        }

        /// Waits until nobody reads or writes.
        pub fn write(&self) -> sync::RwLockWriteGuard<'_, T> {
            self.0.write().unwrap_or_else(std::sync::PoisonError::into_inner)
        }
    }
}
