//! Words of page-locked memory, into which the device writes whether a plan's lists are good.

use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use cudarc::driver::sys;
use kvhook_abi::raw::KVH_REASON_OTHER;
use kvhook_kernels::cuda::verdict::{FaultKind, Outcome};
use parking_lot::Mutex;

use super::*;
use crate::device::Checked;
use crate::plan::Refusal;

/// Words of a device: the most tickets whose verdict is on its way.
const WORDS: usize = 4096;

/// All words of a device.
pub(super) struct Words {
    /// Page-locked; only ever used as atomics.
    words: NonNull<AtomicU64>,
    lists: Mutex<Lists>,
    pulse: Pulse,
    context: Arc<Context>,
}

// SAFETY: the words are atomics, which live as long as this.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

/// Which words are not in use.
struct Lists {
    free: Vec<usize>,
    /// Given back before the device wrote them: free once it has.
    awaited: Vec<usize>,
}

impl Words {
    /// Allocates the words.
    ///
    /// # Errors
    /// `Device`.
    pub(super) fn new(context: Arc<Context>) -> Result<Self, HostError> {
        let entered = context.enter()?;
        let mut data = core::ptr::null_mut();
        // SAFETY: the answer is ours to write; portable, so that it is page-locked for every context.
        let status =
            unsafe { sys::cuMemHostAlloc(&raw mut data, WORDS * size_of::<u64>(), sys::CU_MEMHOSTALLOC_PORTABLE) };
        status.result().map_err(driver("allocating page-locked memory"))?;
        let words = NonNull::new(data.cast())
            .ok_or_else(|| HostError::Device("the driver gave no page-locked memory".to_owned()))?;
        let pulse = Pulse::new().inspect_err(|_| {
            // SAFETY: just allocated, and used by nobody.
            let _ = unsafe { sys::cuMemFreeHost(data) };
        })?;
        drop(entered);
        let lists = Mutex::new(Lists { free: (0..WORDS).collect(), awaited: Vec::new() });
        Ok(Self { words, lists, pulse, context })
    }

    /// A word that says `PENDING`.
    ///
    /// # Errors
    /// `OutOfMemory` when all are on their way.
    fn take(&self) -> Result<usize, HostError> {
        let mut lists = self.lists.lock();
        if lists.free.is_empty() {
            let awaited = core::mem::take(&mut lists.awaited);
            let written = |&index: &usize| self.at(index).load(Ordering::Acquire) != Verdict::PENDING;
            (lists.free, lists.awaited) = awaited.into_iter().partition(written);
        }
        let index = lists.free.pop().ok_or(HostError::OutOfMemory { bytes: 8, what: "a verdict" })?;
        self.at(index).store(Verdict::PENDING, Ordering::Release);
        Ok(index)
    }

    fn give_back(&self, index: usize) {
        let written = self.at(index).load(Ordering::Acquire) != Verdict::PENDING;
        let mut lists = self.lists.lock();
        if written { lists.free.push(index) } else { lists.awaited.push(index) }
    }

    /// What the device fails with, if it does: then it writes no word any more.
    fn fault(&self) -> Option<HostError> {
        match self.context.enter() {
            Ok(_entered) => self.pulse.fault(),
            Err(error) => Some(error),
        }
    }

    fn at(&self, index: usize) -> &AtomicU64 {
        // SAFETY: `take` gives out indices of words that were allocated; integers take every pattern.
        unsafe { self.words.add(index).as_ref() }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        let Ok(_entered) = self.context.enter() else { return };
        self.pulse.end();
        // SAFETY: allocated in `new`, and whoever ends a host has ended the work that writes here.
        let _ = unsafe { sys::cuMemFreeHost(self.words.as_ptr().cast()) };
    }
}

/// One plan's word, with what a fault's item number stands for.
pub struct Word {
    words: Arc<Words>,
    index: usize,
    /// Layer of each item, and the limit of its positions, where it is a list of those.
    items: Vec<(usize, Option<u64>)>,
    /// Holds working memory in its first bytes.
    block: Arc<Block>,
    scratch_bytes: usize,
}

impl Word {
    /// Takes a word.
    ///
    /// # Errors
    /// `OutOfMemory`.
    pub(super) fn new(
        words: &Arc<Words>,
        items: Vec<(usize, Option<u64>)>,
        block: Arc<Block>,
        scratch_bytes: usize,
    ) -> Result<Self, HostError> {
        Ok(Self { index: words.take()?, words: words.clone(), items, block, scratch_bytes })
    }

    /// Where the device's copy goes: valid as long as the device lives.
    pub fn address(&self) -> *mut u64 {
        self.words.at(self.index).as_ptr()
    }

    /// The word will not be written: nothing was enqueued for it.
    pub fn cancel(&self) {
        self.words.at(self.index).store(u64::MAX, Ordering::Release);
    }

    /// Working memory for the commit, which belongs to the plan.
    pub fn scratch(&self) -> DeviceSlice<u8> {
        // SAFETY: the block goes back in the order of the stream that used it last.
        unsafe { DeviceSlice::new(self.block.data() as u64, self.scratch_bytes) }
            .unwrap_or_else(|_| DeviceSlice::empty())
    }

    /// As [`Block::release_on`].
    pub fn release_on(&self, stream: *mut c_void) {
        self.block.release_on(stream);
    }

    /// What the device has said. A device that will not say it any more has a fault of its own.
    pub fn poll(&self) -> Checked {
        let fault = match Outcome::decode(self.words.at(self.index).load(Ordering::Acquire)) {
            Outcome::Pending => {
                let fault = self.words.fault().map(|error| Refusal::new(KVHOOK_REASON_DEVICE, error.to_string()));
                return fault.map_or(Checked::Pending, Checked::Bad);
            }
            Outcome::Good => return Checked::Good,
            Outcome::Bad(fault) => fault,
        };
        let (head, place) = (fault.head, fault.place);
        let (layer, limit) = self.items.get(fault.item).copied().unwrap_or_default();
        let refusal = match limit {
            None => Refusal::new(KVHOOK_REASON_BAD_INDEX, format!("head {head}, place {place}: {}", fault.kind)),
            Some(_) if fault.kind == FaultKind::TooLarge => {
                Refusal::new(KVH_REASON_OTHER, format!("new row {place} of a head: {}", fault.kind))
            }
            Some(limit) => {
                let problem = match fault.kind {
                    FaultKind::Descending => "a position is lower than the one before it",
                    _ => "a position is too high",
                };
                let text = format!("head {head}, place {place}: {problem}; expected ascending order, below {limit}");
                Refusal::new(KVHOOK_REASON_BAD_POSITION, text)
            }
        };
        Checked::Bad(refusal.in_layer(layer))
    }
}

impl Drop for Word {
    fn drop(&mut self) {
        self.words.give_back(self.index);
    }
}
