//! A plugin's logs go to its host.
//!
//! Each shared library has its own copy of `tracing` and of the panic hook, so both are installed here, once for
//! the library. A message goes to the host of the instance that is being called on this thread; from other threads, to
//! the host of the instance created last.

use core::cell::Cell;
use core::ptr;
use std::panic::PanicHookInfo;
use std::sync::{Once, PoisonError, RwLock};

use crate::call::Host;
use crate::raw::*;

thread_local! {
    /// Host of the instance that this thread is calling. No destructor: nothing keeps the library's TLS alive.
    static CURRENT: Cell<*const Host> = const { Cell::new(ptr::null()) };
}

/// Hosts of living instances, in order of creation.
static HOSTS: RwLock<Vec<HostAddress>> = RwLock::new(Vec::new());

#[derive(Clone, Copy, PartialEq)]
struct HostAddress(*const Host);
// SAFETY: `Host` is `Sync`; the address is used only while `HOSTS` lists it.
unsafe impl Send for HostAddress {}
// SAFETY: as above.
unsafe impl Sync for HostAddress {}

/// Until it is dropped, messages of this thread go to a host.
pub(crate) struct Current(*const Host);

/// Directs this thread's messages to `host`, which must outlive the answer.
pub(crate) fn enter(host: &Host) -> Current {
    Current(CURRENT.replace(host))
}

impl Drop for Current {
    fn drop(&mut self) {
        CURRENT.set(self.0);
    }
}

/// Installs the bridges, once for the library, and lets through what `host` wants.
pub(crate) fn connect(host: &Host) {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(install);
    bridge::raise(host.max_log_level());
}

/// Adds the host of a new instance, at the address where it stays.
pub(crate) fn add(host: &Host) {
    HOSTS.write().unwrap_or_else(PoisonError::into_inner).push(HostAddress(host));
}

/// Forgets the host of an instance that ends.
pub(crate) fn remove(host: &Host) {
    HOSTS.write().unwrap_or_else(PoisonError::into_inner).retain(|other| *other != HostAddress(host));
}

fn install() {
    bridge::install();
    let previous = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        log_panic(info);
        // On a thread that no hook is running on, somebody else may want to explain it too.
        if CURRENT.get().is_null() {
            previous(info);
        }
    }));
}

fn log_panic(info: &PanicHookInfo<'_>) {
    let message = info.payload_as_str().unwrap_or("no message");
    let (file, line) = info.location().map_or(("", 0), |location| (location.file(), location.line()));
    write(KVH_LOG_ERROR, "panic", &format!("the plugin panicked: {message}"), file, line);
}

/// Writes a message to the host, if there is one and it wants this level (`KVH_LOG_*`).
pub fn write(level: i32, target: &str, message: &str, file: &str, line: u32) {
    let send = |host: &Host| {
        if level <= host.max_log_level() {
            host.log(level, target, message, file, line);
        }
    };
    // SAFETY: null, or set by `enter`, whose guard keeps within the host's life.
    if let Some(host) = unsafe { CURRENT.get().as_ref() } {
        return send(host);
    }
    let hosts = HOSTS.read().unwrap_or_else(PoisonError::into_inner);
    if let Some(HostAddress(host)) = hosts.last() {
        // SAFETY: listed hosts live: `remove` waits for this lock.
        send(unsafe { &**host });
    }
}

#[cfg(not(feature = "tracing"))]
mod bridge {
    pub(super) fn install() {}
    pub(super) fn raise(_level: i32) {}
}

#[cfg(feature = "tracing")]
mod bridge {
    use core::fmt::{self, Write};
    use core::sync::atomic::{AtomicI32, Ordering};

    use tracing::field::{Field, Visit};
    use tracing::level_filters::LevelFilter;
    use tracing::span::{Attributes, Id, Record};
    use tracing::{Event, Level, Metadata, Subscriber};

    use crate::raw::*;

    /// The highest `KVH_LOG_*` level that any host asked for so far.
    static LEVEL: AtomicI32 = AtomicI32::new(0);

    /// Makes the host's log this library's `tracing` subscriber, unless the library has one already.
    pub(super) fn install() {
        let _ = tracing::subscriber::set_global_default(HostSubscriber);
    }

    /// Lets messages up to `level` through. A disabled one costs one comparison: `tracing` asks for the maximum
    /// level only when it changes.
    pub(super) fn raise(level: i32) {
        if LEVEL.fetch_max(level, Ordering::Relaxed) < level {
            tracing::callsite::rebuild_interest_cache();
        }
    }

    /// Sends events to the host, with their fields in the text. Spans do not cross the boundary.
    struct HostSubscriber;

    impl Subscriber for HostSubscriber {
        fn enabled(&self, metadata: &Metadata<'_>) -> bool {
            metadata.is_event() && raw_level(metadata.level()) <= LEVEL.load(Ordering::Relaxed)
        }

        fn max_level_hint(&self) -> Option<LevelFilter> {
            Some(match LEVEL.load(Ordering::Relaxed) {
                ..KVH_LOG_ERROR => LevelFilter::OFF,
                KVH_LOG_ERROR => LevelFilter::ERROR,
                KVH_LOG_WARN => LevelFilter::WARN,
                KVH_LOG_INFO => LevelFilter::INFO,
                KVH_LOG_DEBUG => LevelFilter::DEBUG,
                KVH_LOG_TRACE.. => LevelFilter::TRACE,
            })
        }

        fn new_span(&self, _span: &Attributes<'_>) -> Id {
            Id::from_u64(1)
        }

        fn record(&self, _span: &Id, _values: &Record<'_>) {}
        fn record_follows_from(&self, _span: &Id, _follows: &Id) {}
        fn enter(&self, _span: &Id) {}
        fn exit(&self, _span: &Id) {}

        fn event(&self, event: &Event<'_>) {
            let mut text = Text::default();
            event.record(&mut text);
            let metadata = event.metadata();
            super::write(
                raw_level(metadata.level()),
                metadata.target(),
                &(text.message + &text.fields),
                metadata.file().unwrap_or(""),
                metadata.line().unwrap_or(0),
            );
        }
    }

    fn raw_level(level: &Level) -> i32 {
        match *level {
            Level::ERROR => KVH_LOG_ERROR,
            Level::WARN => KVH_LOG_WARN,
            Level::INFO => KVH_LOG_INFO,
            Level::DEBUG => KVH_LOG_DEBUG,
            Level::TRACE => KVH_LOG_TRACE,
        }
    }

    /// An event's message, and its other fields as ` name=value`.
    #[derive(Default)]
    struct Text {
        message: String,
        fields: String,
    }

    impl Visit for Text {
        fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
            // Writing to a string cannot fail.
            let _ = if field.name() == "message" {
                write!(self.message, "{value:?}")
            } else {
                write!(self.fields, " {}={value:?}", field.name())
            };
        }
    }
}
