//! What a plugin may ask of the mock engine: log, memory, rows.

use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use kvhook_abi::boundary::{self, write_text};
use kvhook_abi::raw::*;
use kvhook_abi::{KVH_LOG_1, KVH_MEMORY_1, KVH_ROWS_1};

use crate::cache::Layer;
use crate::fault::Fault;
use crate::guarded::Guarded;

/// The host of one instance.
pub struct Host {
    max_level: AtomicI32,
    refuse_memory: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    logs: Vec<(i32, String)>,
    memory: Vec<Block>,
    call: Option<Running>,
    faults: Vec<Fault>,
}

/// Memory that is lent.
struct Block {
    kind: u32,
    uid: u64,
    memory: Guarded,
}

/// The call that is running.
struct Running {
    thread: ThreadId,
    uids: Vec<u64>,
    /// For each sequence: the rows that a rewrite fills.
    rows: Vec<Vec<Layer>>,
}

impl Host {
    pub(crate) fn new(max_level: i32) -> Self {
        let max_level = AtomicI32::new(max_level);
        Self { max_level, refuse_memory: AtomicBool::new(false), state: Mutex::default() }
    }

    pub(crate) fn raw(&self) -> KvhHost {
        KvhHost {
            struct_size: size_of::<KvhHost>(),
            state: ptr::from_ref(self).cast_mut().cast(),
            abi_major: KVH_ABI_MAJOR,
            abi_minor: KVH_ABI_MINOR,
            name: KvhStr::new("kvhook-testing"),
            service: Some(service),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a log message contains `part`; a message ends with its source file in brackets.
    pub fn logged(&self, part: &str) -> bool {
        self.state().logs.iter().any(|(_, text)| text.contains(part))
    }

    /// Log messages so far: `KVH_LOG_*` and text.
    pub fn logs(&self) -> Vec<(i32, String)> {
        self.state().logs.clone()
    }

    /// From now on, whether requests for memory and rows are refused.
    pub fn refuse_memory(&self, refuse: bool) {
        self.refuse_memory.store(refuse, Ordering::Relaxed);
    }

    /// Bytes of memory of one kind (`KVH_MEMORY_*`) that is lent now.
    pub fn lent(&self, kind: u32) -> usize {
        let of_kind = |block: &&Block| block.kind == kind;
        self.state().memory.iter().filter(of_kind).map(|block| block.memory.bytes().len()).sum()
    }

    /// A call begins, about these sequences, on this thread.
    pub(crate) fn begin(&self, uids: Vec<u64>, rows: Vec<Vec<Layer>>) {
        self.state().call = Some(Running { thread: thread::current().id(), uids, rows });
    }

    /// The handle of the call.
    pub(crate) fn call(&self) -> *mut KvhCall {
        ptr::from_ref(self).cast_mut().cast()
    }

    /// The call is over: the rows that it lent, checked with all memory.
    pub(crate) fn end(&self) -> Result<Vec<Vec<Layer>>, Fault> {
        let mut state = self.state();
        for block in &state.memory {
            if let Some(at) = block.memory.damage() {
                return Err(Fault::Outside { what: block.name(), at, bytes: block.memory.bytes().len() });
            }
        }
        let rows = state.call.take().map_or(Vec::new(), |call| call.rows);
        for layers in &rows {
            layers.iter().enumerate().try_for_each(|(index, layer)| layer.check_bands(index, "lent rows"))?;
        }
        state.faults.pop().map_or(Ok(rows), Err)
    }

    /// Takes back memory: of the calls that are over, or of a sequence that is.
    pub(crate) fn take_back(&self, uid: Option<u64>) {
        self.state().memory.retain(|block| block.kind == KVH_MEMORY_SEQUENCE && Some(block.uid) != uid);
    }

    fn allocate(&self, call: *mut KvhCall, request: &KvhAllocation) -> Result<*mut c_void, (KvhStatus, String)> {
        let mut state = self.state();
        match Self::block(&state, self, call, request) {
            Ok(_) if self.refuse_memory.load(Ordering::Relaxed) => {
                Err((KVH_ERR_OUT_OF_MEMORY, "the pool is empty".into()))
            }
            Ok(mut block) => {
                let address = block.memory.address_mut();
                state.memory.push(block);
                Ok(address)
            }
            Err(what) => {
                state.faults.push(Fault::Allocation { what: what.clone() });
                Err((KVH_ERR_INVALID_ARGUMENT, what))
            }
        }
    }

    fn block(state: &State, host: &Self, call: *mut KvhCall, request: &KvhAllocation) -> Result<Block, String> {
        let running = state.call.as_ref().ok_or("outside of a call")?;
        if call != host.call() {
            return Err("`call` is not the handle of the call that is running".into());
        }
        if thread::current().id() != running.thread {
            return Err("from another thread than the one that called the hook".into());
        }
        let KvhAllocation { kind, sequence, bytes, alignment, .. } = *request;
        if bytes == 0 || !alignment.is_power_of_two() || alignment > 4096 {
            return Err(format!("{bytes} bytes aligned to {alignment}; at least 1, and a power of two up to 4096"));
        }
        let of_sequence = running.uids.get(sequence as usize).copied();
        let uid = match kind {
            KVH_MEMORY_CALL => 0,
            KVH_MEMORY_TICKET | KVH_MEMORY_SEQUENCE => {
                of_sequence.ok_or(format!("for sequence {sequence} of a call with {}", running.uids.len()))?
            }
            _ => return Err(format!("of kind {kind}, which does not exist")),
        };
        // Not zero: whoever reads before writing shall see it.
        Ok(Block { kind, uid, memory: Guarded::new(bytes as usize, alignment as usize, 0x55) })
    }

    fn lend(&self, call: *mut KvhCall, sequence: u64, layers: KvhArrayMut) -> Result<(), (KvhStatus, String)> {
        let mut state = self.state();
        let refuse = self.refuse_memory.load(Ordering::Relaxed);
        let lent = match state.call.as_mut() {
            Some(running) if call == self.call() => running.rows.get_mut(sequence as usize),
            _ => None,
        };
        let Some(lent) = lent.filter(|lent| lent.len() as u64 == layers.count) else {
            let what = format!("rows of {} layers for sequence {sequence}: not of this call", layers.count);
            state.faults.push(Fault::Allocation { what: what.clone() });
            return Err((KVH_ERR_INVALID_ARGUMENT, what));
        };
        if refuse {
            return Err((KVH_ERR_OUT_OF_MEMORY, "no rows are left".into()));
        }
        for (index, layer) in lent.iter_mut().enumerate() {
            let place = layers.data.wrapping_byte_add(index * layers.stride as usize).cast::<KvhLayer>();
            let view = layer.lend(index);
            // SAFETY: the plugin gives `count` elements, `stride` bytes apart, each with `struct_size` filled.
            unsafe {
                let room = place.cast::<usize>().read().min(size_of::<KvhLayer>());
                let rest = room.saturating_sub(size_of::<usize>());
                let from = (&raw const view).cast::<u8>().add(size_of::<usize>());
                place.cast::<u8>().add(size_of::<usize>()).copy_from_nonoverlapping(from, rest);
            }
        }
        Ok(())
    }
}

impl Block {
    fn name(&self) -> String {
        match self.kind {
            KVH_MEMORY_CALL => "call memory".into(),
            KVH_MEMORY_TICKET => format!("ticket memory of sequence {}", self.uid),
            _ => format!("sequence memory of sequence {}", self.uid),
        }
    }
}

unsafe extern "C" fn service(_: *mut KvhHostState, id: KvhStr) -> *const c_void {
    static LOG: KvhLog1 = KvhLog1 { max_level: Some(max_level), write: Some(write) };
    static MEMORY: KvhMemory1 = KvhMemory1 { allocate: Some(allocate) };
    static ROWS: KvhRows1 = KvhRows1 { lend: Some(lend) };
    // SAFETY: the plugin's text, for the call.
    match unsafe { boundary::text(id, "id") } {
        Ok(KVH_LOG_1) => (&raw const LOG).cast(),
        Ok(KVH_MEMORY_1) => (&raw const MEMORY).cast(),
        Ok(KVH_ROWS_1) => (&raw const ROWS).cast(),
        _ => ptr::null(),
    }
}

/// # Safety
/// The state is of a [`Host`] that lives.
unsafe fn host<'a>(state: *mut KvhHostState) -> &'a Host {
    // SAFETY: the caller's promise.
    unsafe { &*state.cast() }
}

unsafe extern "C" fn max_level(state: *mut KvhHostState) -> i32 {
    // SAFETY: a plugin hands back the state that it got.
    unsafe { host(state) }.max_level.load(Ordering::Relaxed)
}

unsafe extern "C" fn write(state: *mut KvhHostState, record: *const KvhLogRecord) {
    // SAFETY: as above; the record is lent for the call.
    let (host, record) = unsafe { (host(state), &*record) };
    // SAFETY: the record's texts, for the call.
    let texts = unsafe { (boundary::text(record.message, "message"), boundary::text(record.file, "file")) };
    let line = match texts {
        (Ok(message), Ok(file)) => format!("{message} [{file}]"),
        (Err(error), _) | (_, Err(error)) => error.to_string(),
    };
    host.state().logs.push((record.level, line));
}

unsafe extern "C" fn allocate(
    state: *mut KvhHostState,
    call: *mut KvhCall,
    request: *const KvhAllocation,
    out: *mut *mut c_void,
    error: *mut KvhText,
) -> KvhStatus {
    // SAFETY: the plugin's request and place, for the call; its state is a host's.
    unsafe {
        match host(state).allocate(call, &*request) {
            Ok(address) => {
                out.write(address);
                KVH_OK
            }
            Err((status, message)) => {
                write_text(error, &message);
                status
            }
        }
    }
}

unsafe extern "C" fn lend(
    state: *mut KvhHostState,
    call: *mut KvhCall,
    sequence: u64,
    layers: KvhArrayMut,
    error: *mut KvhText,
) -> KvhStatus {
    // SAFETY: as for `allocate`.
    unsafe {
        match host(state).lend(call, sequence, layers) {
            Ok(()) => KVH_OK,
            Err((status, message)) => {
                write_text(error, &message);
                status
            }
        }
    }
}
