//! Whether a device still works, asked without waiting for it.

use cudarc::driver::sys;
use parking_lot::Mutex;

use super::*;

/// A stream of the host's own with one event on it. Nothing else ever runs there, so the event is soon done, and what the
/// driver answers about it is the state of the device: a fault of whatever work, by whomever, is told with every call.
pub(super) struct Pulse {
    stream: sys::CUstream,
    event: sys::CUevent,
    in_use: Mutex<()>,
}

// SAFETY: the driver lets any thread use streams and events; the lock orders those who do.
unsafe impl Send for Pulse {}
// SAFETY: as above.
unsafe impl Sync for Pulse {}

impl Pulse {
    /// Makes stream and event. The context must be current.
    ///
    /// # Errors
    /// `Device`.
    pub(super) fn new() -> Result<Self, HostError> {
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(driver("creating a stream for the device's state"))?;
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
        let event = event.map_err(driver("creating an event for the device's state")).inspect_err(|_| {
            // SAFETY: just made, and used by nobody.
            let _ = unsafe { result::stream::destroy(stream) };
        })?;
        Ok(Self { stream, event, in_use: Mutex::new(()) })
    }

    /// The device's error, if it has one. At most one event is on its way at a time, so that asking never fills a queue.
    /// The context must be current.
    pub(super) fn fault(&self) -> Option<HostError> {
        let _in_use = self.in_use.try_lock()?;
        let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // Another thread may capture a stream in a mode that forbids these calls everywhere. They touch no stream of its.
        // SAFETY: it exchanges the thread's mode with ours, which is undone below.
        let relaxed = unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) };
        // SAFETY: the event is ours, and lives.
        let mut status = unsafe { sys::cuEventQuery(self.event) };
        if status == sys::CUresult::CUDA_SUCCESS {
            // SAFETY: as above, and the stream.
            status = unsafe { sys::cuEventRecord(self.event, self.stream) };
        }
        if relaxed == sys::CUresult::CUDA_SUCCESS {
            // SAFETY: as above.
            let _ = unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) };
        }
        match status {
            sys::CUresult::CUDA_SUCCESS | sys::CUresult::CUDA_ERROR_NOT_READY => None,
            error => error.result().map_err(driver("waiting for a verdict")).err(),
        }
    }

    /// Ends stream and event. The context must be current.
    pub(super) fn end(&self) {
        // SAFETY: both are ours, and nobody uses them any more. A failure can be told to nobody here.
        let _ = unsafe { (result::event::destroy(self.event), result::stream::destroy(self.stream)) };
    }
}
