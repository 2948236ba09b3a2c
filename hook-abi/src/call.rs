//! The host's services, and one call of a hook.

use core::ffi::c_void;
use core::marker::PhantomData;
use core::ptr::{self, NonNull};
use std::sync::{Mutex, PoisonError};

use crate::boundary;
use crate::error::PluginError;
use crate::ids::{KVH_LOG_1, KVH_MEMORY_1, KVH_ROWS_1};
use crate::raw::*;

/// Room for a service's error text.
const ERROR_BYTES: usize = 512;

type Allocate = unsafe extern "C" fn(
    *mut KvhHostState,
    *mut KvhCall,
    *const KvhAllocation,
    *mut *mut c_void,
    *mut KvhText,
) -> KvhStatus;
type Lend = unsafe extern "C" fn(*mut KvhHostState, *mut KvhCall, u64, KvhArrayMut, *mut KvhText) -> KvhStatus;

/// The host of an instance. Valid as long as the instance.
pub struct Host {
    state: *mut KvhHostState,
    name: String,
    abi_minor: u32,
    max_level: Option<unsafe extern "C" fn(*mut KvhHostState) -> i32>,
    write: Option<unsafe extern "C" fn(*mut KvhHostState, *const KvhLogRecord)>,
    allocate: Option<Allocate>,
    lend: Option<Lend>,
}

// SAFETY: the state is only handed back to the services; the log may be called from any thread, the others are
// reached through a `Call` only, which is neither `Send` nor `Sync`.
unsafe impl Send for Host {}
// SAFETY: as above.
unsafe impl Sync for Host {}

impl Host {
    /// Looks up the services.
    ///
    /// # Safety
    /// `host` is null or what the contract says of [`KvhHost`], for as long as the value lives.
    pub(crate) unsafe fn new(host: *const KvhHost) -> Result<Self, PluginError> {
        // SAFETY: passed on from the caller.
        let raw = unsafe { boundary::read(host, "args.host")? };
        // SAFETY: the contract makes the name readable.
        let name = unsafe { boundary::text(raw.name, "host.name")? }.to_owned();
        let Some(service) = raw.service else {
            return Err(PluginError::InvalidArgument("`host.service` is null".into()));
        };
        // SAFETY: ids are valid text; the state goes back where it came from.
        let find = |id: &str| unsafe { service(raw.state, KvhStr::new(id)) };
        // SAFETY: a service's table is null or the frozen table that its id names.
        let (log, memory, rows) = unsafe {
            (
                find(KVH_LOG_1).cast::<KvhLog1>().as_ref(),
                find(KVH_MEMORY_1).cast::<KvhMemory1>().as_ref(),
                find(KVH_ROWS_1).cast::<KvhRows1>().as_ref(),
            )
        };
        Ok(Self {
            state: raw.state,
            name,
            abi_minor: raw.abi_minor,
            max_level: log.and_then(|table| table.max_level),
            write: log.and_then(|table| table.write),
            allocate: memory.and_then(|table| table.allocate),
            lend: rows.and_then(|table| table.lend),
        })
    }

    /// Name and version, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Minor version of the ABI that the host speaks.
    pub fn abi_minor(&self) -> u32 {
        self.abi_minor
    }

    /// The lowest importance that the host's log wants: `KVH_LOG_*`, 0 for nothing.
    pub fn max_log_level(&self) -> i32 {
        // SAFETY: the contract allows this from any thread while the instance lives.
        self.max_level.map_or(0, |max_level| unsafe { max_level(self.state) })
    }

    /// Writes to the host's log.
    pub fn log(&self, level: i32, target: &str, message: &str, file: &str, line: u32) {
        let Some(write) = self.write else { return };
        let record = KvhLogRecord {
            struct_size: size_of::<KvhLogRecord>(),
            level,
            line,
            target: KvhStr::new(target),
            message: KvhStr::new(message),
            file: KvhStr::new(file),
        };
        // SAFETY: the record and its text live until the call returns; any thread may call this.
        unsafe { write(self.state, &raw const record) }
    }
}

/// Plain values that may be lent as slices: all zeroes is a value, and so is any other pattern.
///
/// # Safety
/// Every bit pattern is a value, and the alignment is at most 4096.
pub unsafe trait Element: Copy {}
// SAFETY: integers and floats take every pattern.
unsafe impl Element for u8 {}
// SAFETY: as above.
unsafe impl Element for u32 {}
// SAFETY: as above.
unsafe impl Element for u64 {}
// SAFETY: as above.
unsafe impl Element for f32 {}
// SAFETY: two integers.
unsafe impl Element for KvhRange {}

/// How long lent memory lives: `KVH_MEMORY_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// Until the work that this call enqueued is done.
    Call,
    /// Until the ticket that this call makes for a sequence (its index in the call) is committed or dropped.
    Ticket(usize),
    /// Until the `on_free` of a sequence (its index in the call) has returned.
    Sequence(usize),
}

/// One call of a hook: its stream, and memory from the host.
#[derive(Clone, Copy)]
pub struct Call<'a> {
    host: &'a Host,
    raw: *mut KvhCall,
    stream: *mut c_void,
    on_cpu: bool,
    ranges: &'a Ranges,
    marker: PhantomData<&'a mut KvhCall>,
}

/// Ranges that the plans of one call point to: host memory, whatever the device, until the instance is called again.
#[derive(Default)]
pub(crate) struct Ranges(Mutex<Vec<Box<[KvhRange]>>>);

impl Ranges {
    /// Forgets those of the call before.
    pub(crate) fn clear(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn keep(&self, ranges: &[KvhRange]) -> *const KvhRange {
        let kept: Box<[KvhRange]> = ranges.into();
        let address = kept.as_ptr();
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(kept);
        address
    }
}

impl<'a> Call<'a> {
    pub(crate) fn new(
        host: &'a Host,
        raw: *mut KvhCall,
        stream: *mut c_void,
        on_cpu: bool,
        ranges: &'a Ranges,
    ) -> Self {
        Self { host, raw, stream, on_cpu, ranges, marker: PhantomData }
    }

    /// A copy of ranges that lives until the host has read the call's plans.
    pub(crate) fn keep_ranges(&self, ranges: &[KvhRange]) -> *const KvhRange {
        self.ranges.keep(ranges)
    }

    /// The engine's stream; null on the CPU. Enqueue here, do not synchronise.
    pub fn stream(&self) -> *mut c_void {
        self.stream
    }

    /// The host.
    pub fn host(&self) -> &'a Host {
        self.host
    }

    /// Whether the cache lies in ordinary memory.
    pub fn on_cpu(&self) -> bool {
        self.on_cpu
    }

    /// Borrows `bytes` bytes of the instance's device from the host, not initialised. The address is valid as long as
    /// `memory` says.
    ///
    /// # Errors
    /// [`PluginError::OutOfMemory`], or another that the host answered; [`PluginError::Unsupported`] when the host has
    /// no memory service.
    pub fn allocate_raw(&self, memory: Memory, bytes: usize, alignment: usize) -> Result<NonNull<u8>, PluginError> {
        let Some(allocate) = self.host.allocate else {
            return Err(PluginError::Unsupported(format!("the host has no service `{KVH_MEMORY_1}`")));
        };
        let (kind, sequence) = match memory {
            Memory::Call => (KVH_MEMORY_CALL, 0),
            Memory::Ticket(sequence) => (KVH_MEMORY_TICKET, sequence),
            Memory::Sequence(sequence) => (KVH_MEMORY_SEQUENCE, sequence),
        };
        let request = KvhAllocation {
            struct_size: size_of::<KvhAllocation>(),
            kind,
            reserved0: 0,
            sequence: sequence as u64,
            bytes: bytes.max(1) as u64,
            alignment: alignment as u64,
        };
        let mut out = ptr::null_mut();
        let mut buffer = [0; ERROR_BYTES];
        let mut error = KvhText::over(&mut buffer);
        // SAFETY: this is the thread of the hook, during the call (`Call` is neither `Send` nor longer lived);
        // every pointer is ours and lives until the call returns.
        let status = unsafe { allocate(self.host.state, self.raw, &raw const request, &raw mut out, &raw mut error) };
        if status != KVH_OK {
            return Err(PluginError::from_service(KVH_MEMORY_1, status, &text_of(&buffer, error.length)));
        }
        match NonNull::new(out.cast::<u8>()) {
            Some(address) if address.as_ptr().addr().is_multiple_of(alignment) => Ok(address),
            _ => Err(PluginError::Internal(format!(
                "`{KVH_MEMORY_1}` answered {out:p} for {bytes} bytes aligned to {alignment}"
            ))),
        }
    }

    /// Borrows zeroed values in ordinary memory from the host.
    ///
    /// # Errors
    /// As [`Self::allocate_raw`]; [`PluginError::Unsupported`] when the instance's memory lies on a device.
    pub fn allocate<T: Element>(&self, memory: Memory, count: usize) -> Result<&'a mut [T], PluginError> {
        if !self.on_cpu {
            return Err(PluginError::Unsupported("memory of a device cannot be lent as a slice".into()));
        }
        let bytes = count
            .checked_mul(size_of::<T>())
            .filter(|bytes| isize::try_from(*bytes).is_ok())
            .ok_or_else(|| PluginError::OutOfMemory(format!("{count} values do not fit the address space")))?;
        let address = self.allocate_raw(memory, bytes, align_of::<T>())?.cast::<T>();
        // SAFETY: the host lends `bytes` bytes, aligned, to this call alone and at least until it ends; zeroes are
        // values of an `Element`.
        unsafe {
            address.as_ptr().write_bytes(0, count);
            Ok(core::slice::from_raw_parts_mut(address.as_ptr(), count))
        }
    }

    /// Borrows fresh rows for a rewrite of sequence `sequence`: for each of its `layers` layers as many as the bound
    /// says. They become the sequence's at commit.
    ///
    /// # Errors
    /// What the host answered; [`PluginError::Unsupported`] when it has no such service.
    pub(crate) fn lend(&self, sequence: usize, layers: usize) -> Result<Vec<KvhLayer>, PluginError> {
        let Some(lend) = self.host.lend else {
            return Err(PluginError::Unsupported(format!("the host has no service `{KVH_ROWS_1}`")));
        };
        // SAFETY: integers and pointers: zeroes are a value.
        let empty = || KvhLayer { struct_size: size_of::<KvhLayer>(), ..unsafe { core::mem::zeroed() } };
        let mut lent: Vec<KvhLayer> = (0..layers).map(|_| empty()).collect();
        let array =
            KvhArrayMut { data: lent.as_mut_ptr().cast(), count: layers as u64, stride: size_of::<KvhLayer>() as u64 };
        let mut buffer = [0; ERROR_BYTES];
        let mut error = KvhText::over(&mut buffer);
        // SAFETY: as in `allocate_raw`.
        let status = unsafe { lend(self.host.state, self.raw, sequence as u64, array, &raw mut error) };
        if status != KVH_OK {
            return Err(PluginError::from_service(KVH_ROWS_1, status, &text_of(&buffer, error.length)));
        }
        Ok(lent)
    }
}

fn text_of(buffer: &[u8], length: usize) -> String {
    String::from_utf8_lossy(&buffer[..length.min(buffer.len())]).into_owned()
}
