//! What a plugin may ask of the host: `kvh.log/1`, `kvh.memory/1`, `kvh.rows/1`.

use core::ffi::c_void;
use core::ptr;
use core::sync::atomic::{AtomicPtr, Ordering};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, ThreadId};

use kvhook_abi::boundary;
use kvhook_abi::ids::{KVH_LOG_1, KVH_MEMORY_1, KVH_ROWS_1};
use kvhook_abi::raw::*;

use crate::callbacks::Callbacks;
use crate::error::HostError;
use crate::instance::HostTable;
use crate::lent::LentLayer;
use crate::memory::{Allocator, Block, SequenceMemory};
use crate::model::Model;

/// Largest alignment that a plugin may ask for.
const MAX_ALIGNMENT: u64 = 4096;

static LOG: KvhLog1 = KvhLog1 { max_level: Some(log_max_level), write: Some(log_write) };
static MEMORY: KvhMemory1 = KvhMemory1 { allocate: Some(memory_allocate) };
static ROWS: KvhRows1 = KvhRows1 { lend: Some(rows_lend) };

/// The host as one instance sees it. Owns all that the instance may point to: its model, too.
pub struct Services {
    table: KvhHost,
    state: Box<State>,
}

/// What [`KvhHostState`] really is.
struct State {
    callbacks: Callbacks,
    model: Arc<Model>,
    /// The call that is under way; calls of one instance are serial.
    call: AtomicPtr<Call>,
}

// SAFETY: the table and what it points to are written only in `new`; the call's pointer is atomic, and a call's
// content is touched only by the thread that made it.
unsafe impl Send for Services {}
// SAFETY: as above.
unsafe impl Sync for Services {}

// SAFETY: the table stands in the heap block of the `Arc` that owns it, and is never written after `new`.
unsafe impl HostTable for Services {
    fn table(&self) -> *const KvhHost {
        &self.table
    }
}

impl Services {
    /// The services of one instance, with the model of its rank.
    pub fn new(callbacks: Callbacks, model: Arc<Model>) -> Arc<Self> {
        let mut state = Box::new(State { callbacks, model, call: AtomicPtr::new(ptr::null_mut()) });
        let table = KvhHost {
            struct_size: size_of::<KvhHost>(),
            state: ptr::from_mut(&mut *state).cast(),
            abi_major: KVH_ABI_MAJOR,
            abi_minor: KVH_ABI_MINOR,
            name: KvhStr::new(crate::NAME),
            service: Some(service),
        };
        Arc::new(Self { table, state })
    }

    /// The model of the instance's rank.
    pub fn model(&self) -> &Model {
        &self.state.model
    }

    /// Runs a hook with the handle of `call`; the handle means nothing afterwards. Gives the call back, with what the
    /// plugin took.
    pub fn during<R>(&self, call: Call, hook: impl FnOnce(*mut KvhCall) -> R) -> (R, Call) {
        let raw = Box::into_raw(Box::new(call));
        self.state.call.store(raw, Ordering::Release);
        let result = hook(raw.cast());
        self.state.call.store(ptr::null_mut(), Ordering::Release);
        // SAFETY: made above; the services that used it meanwhile ran on this thread and have returned.
        (result, *unsafe { Box::from_raw(raw) })
    }
}

/// What [`KvhCall`] really is: one call of a hook.
pub struct Call {
    thread: ThreadId,
    allocator: Allocator,
    stream: *mut c_void,
    /// Given back when the call is dropped.
    memory: Vec<Block>,
    /// In the order in which the plugin sees them.
    pub sequences: Vec<CallSequence>,
}

/// A sequence of a call.
pub struct CallSequence {
    /// Where memory of the sequence's kind goes.
    pub memory: SequenceMemory,
    /// What may be planned; none in `before_attention`.
    pub planning: Option<Planning>,
}

/// What a call that plans may take for a sequence.
pub struct Planning {
    /// Rows to lend in each layer: the bound; 0 where nothing is planned.
    pub counts: Vec<u64>,
    /// Whether the engine offers rewrites.
    pub may_rewrite: bool,
    /// Memory of the ticket's kind.
    pub memory: Vec<Block>,
    /// Rows that were lent, for each layer.
    pub lent: Option<Vec<Option<LentLayer>>>,
}

impl Call {
    /// A call by this thread.
    pub fn new(allocator: Allocator, stream: *mut c_void, sequences: Vec<CallSequence>) -> Self {
        Self { thread: thread::current().id(), allocator, stream, memory: Vec::new(), sequences }
    }
}

/// # Safety
/// `id` is valid text.
unsafe extern "C" fn service(_state: *mut KvhHostState, id: KvhStr) -> *const c_void {
    // SAFETY: passed on from the caller.
    match unsafe { boundary::text(id, "id") } {
        Ok(KVH_LOG_1) => ptr::from_ref(&LOG).cast(),
        Ok(KVH_MEMORY_1) => ptr::from_ref(&MEMORY).cast(),
        Ok(KVH_ROWS_1) => ptr::from_ref(&ROWS).cast(),
        _ => ptr::null(),
    }
}

/// # Safety
/// `host` is null or the state of live services.
unsafe fn state<'a>(host: *mut KvhHostState) -> Option<&'a State> {
    // SAFETY: passed on from the caller; the state is only shared, never borrowed mutably.
    unsafe { host.cast::<State>().as_ref() }
}

/// # Safety
/// As `kvh.log/1` says.
unsafe extern "C" fn log_max_level(host: *mut KvhHostState) -> i32 {
    // SAFETY: the plugin hands back what it was given.
    unsafe { state(host) }.map_or(0, |state| state.callbacks.max_level())
}

/// # Safety
/// As `kvh.log/1` says.
unsafe extern "C" fn log_write(host: *mut KvhHostState, record: *const KvhLogRecord) {
    // SAFETY: the plugin hands back what it was given, and lends the record.
    let (state, record) = unsafe { (state(host), boundary::read(record, "record")) };
    if let (Some(state), Ok(record)) = (state, record)
        && record.level <= state.callbacks.max_level()
    {
        state.callbacks.forward(&record);
    }
}

/// # Safety
/// As `kvh.memory/1` says.
unsafe extern "C" fn memory_allocate(
    host: *mut KvhHostState,
    call: *mut KvhCall,
    request: *const KvhAllocation,
    out: *mut *mut c_void,
    error: *mut KvhText,
) -> KvhStatus {
    // SAFETY: the plugin hands back what it was given.
    let serve = |call: &mut Call, _: &State| {
        // SAFETY: the plugin lends the request during the call.
        let request = unsafe { boundary::read(request, "request")? };
        let data = allocate(call, &request)?;
        if out.is_null() {
            return Err(argument("`out` is null"));
        }
        // SAFETY: not null; the plugin lends it during the call.
        unsafe { out.write(data.cast()) };
        Ok(())
    };
    // SAFETY: as above.
    unsafe { answer(host, call, error, serve) }
}

fn allocate(call: &mut Call, request: &KvhAllocation) -> Result<*mut u8, HostError> {
    if request.bytes == 0 {
        return Err(argument("`request.bytes` is 0; expected at least 1"));
    }
    if !request.alignment.is_power_of_two() || request.alignment > MAX_ALIGNMENT {
        return Err(HostError::Argument(format!(
            "`request.alignment` is {}; expected a power of two up to {MAX_ALIGNMENT}",
            request.alignment
        )));
    }
    let sequences = call.sequences.len();
    let sequence = usize::try_from(request.sequence).ok().and_then(|index| call.sequences.get_mut(index));
    let no_sequence = || {
        HostError::Argument(format!("`request.sequence` is {}; the call has {sequences} sequences", request.sequence))
    };
    let block = |what| Block::new(call.allocator, request.bytes, request.alignment, call.stream, what);
    match request.kind {
        KVH_MEMORY_CALL => {
            let block = block("a plugin's call")?;
            let data = block.data();
            call.memory.push(block);
            Ok(data)
        }
        KVH_MEMORY_TICKET => {
            let planning = sequence
                .ok_or_else(no_sequence)?
                .planning
                .as_mut()
                .ok_or_else(|| argument("`request.kind` is ticket memory, but this hook makes no ticket"))?;
            let block = block("a plugin's ticket")?;
            let data = block.data();
            planning.memory.push(block);
            Ok(data)
        }
        KVH_MEMORY_SEQUENCE => {
            let memory = &sequence.ok_or_else(no_sequence)?.memory;
            let block = block("a plugin's sequence")?;
            let data = block.data();
            memory.push(block);
            Ok(data)
        }
        other => Err(HostError::Argument(format!("`request.kind` is {other}; expected a KVH_MEMORY_*"))),
    }
}

/// # Safety
/// As `kvh.rows/1` says.
unsafe extern "C" fn rows_lend(
    host: *mut KvhHostState,
    call: *mut KvhCall,
    sequence: u64,
    layers: KvhArrayMut,
    error: *mut KvhText,
) -> KvhStatus {
    let serve = |call: &mut Call, state: &State| {
        let (allocator, stream) = (call.allocator, call.stream);
        let planning = usize::try_from(sequence)
            .ok()
            .and_then(|index| call.sequences.get_mut(index))
            .and_then(|sequence| sequence.planning.as_mut())
            .ok_or_else(|| HostError::Argument(format!("`sequence` {sequence} is none that this call plans")))?;
        if !planning.may_rewrite {
            return Err(HostError::Unsupported(
                "the engine offers no rewrites (KVH_CAN_REWRITE), so no rows are lent".to_owned(),
            ));
        }
        if planning.lent.is_some() {
            return Err(argument("rows were already lent for this sequence"));
        }
        let model = &state.model;
        if layers.count != model.layers().len() as u64 {
            return Err(HostError::Argument(format!(
                "`layers` has {} elements; the model has {} layers",
                layers.count,
                model.layers().len()
            )));
        }
        let lent = (0..model.layers().len())
            .map(|layer| LentLayer::new(model, layer, planning.counts[layer], allocator, stream))
            .collect::<Result<Vec<_>, _>>()?;
        for (layer, rows) in lent.iter().enumerate() {
            let view = rows.as_ref().map_or_else(|| LentLayer::none(model, layer), LentLayer::view);
            let place = layers.data.wrapping_byte_add(layer * layers.stride as usize).cast::<KvhLayer>();
            // SAFETY: the plugin lends an array of `count` elements, each with its `struct_size`.
            unsafe { boundary::write(place, &view, "layers")? };
        }
        planning.lent = Some(lent);
        Ok(())
    };
    // SAFETY: the plugin hands back what it was given.
    unsafe { answer(host, call, error, serve) }
}

/// Runs a service for the call that is under way; no panic passes the boundary.
///
/// # Safety
/// `host` is null or the state of live services; `error` is null or a text buffer.
unsafe fn answer(
    host: *mut KvhHostState,
    call: *mut KvhCall,
    error: *mut KvhText,
    serve: impl FnOnce(&mut Call, &State) -> Result<(), HostError>,
) -> KvhStatus {
    let served = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: passed on from the caller.
        let state = unsafe { state(host) }.ok_or_else(|| argument("`host` is null"))?;
        let call: *mut Call = call.cast();
        if call.is_null() || call != state.call.load(Ordering::Acquire) {
            return Err(argument("`call` is not the call that is under way"));
        }
        // SAFETY: the call is under way, so it is alive; its thread never changes.
        if unsafe { (*call).thread } != thread::current().id() {
            return Err(argument("`call` belongs to another thread"));
        }
        // SAFETY: this is the call's own thread, which is inside the hook and so holds no other borrow of it.
        serve(unsafe { &mut *call }, state)
    }));
    let failure = match served {
        Ok(Ok(())) => return KVH_OK,
        Ok(Err(failure)) => failure,
        Err(_) => HostError::Internal("a service panicked".to_owned()),
    };
    // SAFETY: passed on from the caller.
    unsafe { boundary::write_text(error, &failure.to_string()) };
    match failure {
        HostError::OutOfMemory { .. } => KVH_ERR_OUT_OF_MEMORY,
        HostError::Unsupported(_) => KVH_ERR_UNSUPPORTED,
        HostError::Device(_) => KVH_ERR_DEVICE,
        HostError::Internal(_) => KVH_ERR_INTERNAL,
        _ => KVH_ERR_INVALID_ARGUMENT,
    }
}

fn argument(text: &str) -> HostError {
    HostError::Argument(text.to_owned())
}
