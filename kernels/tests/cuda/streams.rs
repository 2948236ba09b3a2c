//! Streams: nothing waits inside an operation, what is captured can be replayed, threads may race.

use std::ffi::c_void;
use std::sync::mpsc;

use cudarc::driver::{result, sys};
use kvhook_kernels::cuda::check::{Check, Indices, check_indices};
use kvhook_kernels::cuda::norms::{RowNorms, Sign, row_norms};
use kvhook_kernels::cuda::select::{Gather, gather, scratch_bytes};
use kvhook_kernels::cuda::top_k::{TopK, top_k};
use kvhook_kernels::cuda::{CudaError, Device, Outcome, Stream};
use kvhook_kernels::{Dtype, IndexKind, Protected, check, norms, select, top_k as host_top_k};

use crate::common::{Cache, Shape};
use crate::gpu::{DeviceCache, Judge, Memory, OwnStream, device};

const HEADS: usize = 4;
const LENGTH: usize = 3000;
const KEEP: usize = 700;
const PROTECTED: Protected = Protected { sinks: 4, recent: 32 };

/// One sequence of one layer: norms, top-k, check, commit in place.
struct Sequence {
    cache: Cache,
    on_device: DeviceCache,
    scores: Memory,
    kept: Memory,
    scratch: Memory,
    judge: Judge,
}

impl Sequence {
    fn new(seed: u64) -> Self {
        let cache = Cache::new(Shape {
            dtype: Dtype::F16,
            kv_heads: HEADS,
            capacity: LENGTH,
            head_dim: 64,
            block_size: 16,
            token_major: true,
            element_step: 1,
            table_per_head: false,
            kind: IndexKind::I32,
            seed,
        });
        let on_device = DeviceCache::new(&cache, false);
        let mut sequence = Self {
            cache,
            on_device,
            scores: Memory::poisoned(4 * HEADS * LENGTH),
            kept: Memory::poisoned(4 * HEADS * KEEP),
            scratch: Memory::new(&[]),
            judge: Judge::new(),
        };
        sequence.scratch = Memory::poisoned(scratch_bytes(&[sequence.gather()]).unwrap());
        sequence
    }

    fn indices(&self) -> Indices {
        Indices::per_head(self.kept.slice(), KEEP)
    }

    fn gather(&self) -> Gather {
        let rows = self.on_device.rows();
        Gather { source: rows, destination: rows, indices: self.indices(), tail: 0..0, destination_start: 0 }
    }

    fn enqueue(&self, device: &Device, stream: Stream) {
        let rows = self.on_device.rows();
        let verdict = self.judge.verdict();
        verdict.clear(device, stream).unwrap();
        let item = RowNorms { rows, tokens: 0..LENGTH, out: self.scores.slice() };
        row_norms(device, stream, &[item], Sign::Negative).unwrap();
        let item = TopK { scores: self.scores.slice(), heads: HEADS, protected: PROTECTED, out: self.kept.slice() };
        top_k(device, stream, &[item], &verdict).unwrap();
        let check = Check { indices: self.indices(), heads: HEADS, length: LENGTH, least: 0 };
        check_indices(device, stream, &[check], &verdict).unwrap();
        gather(device, stream, &[self.gather()], Some(&verdict), self.scratch.slice()).unwrap();
        // SAFETY: the word is pinned, and lives until the stream was waited for.
        unsafe { verdict.fetch(device, stream, self.judge.host()) }.unwrap();
    }

    /// The same once more on the CPU.
    fn on_host(&mut self) {
        let rows = self.cache.rows();
        let mut scores = vec![0.0; HEADS * LENGTH];
        norms::row_norms(&rows, 0..HEADS, 0..LENGTH, &mut scores).unwrap();
        scores.iter_mut().for_each(|score| *score = -*score);
        let mut kept = vec![0; HEADS * KEEP];
        host_top_k::top_k_heads(&scores, HEADS, PROTECTED, &mut kept).unwrap();
        select::gather(&rows, &rows, 0..HEADS, &check::Indices::per_head(&kept, KEEP), 0).unwrap();
    }

    fn is_equal(&self) -> bool {
        self.on_device.memory.bytes() == self.cache.bytes
    }
}

/// A stream that waits until it is let go.
struct Gate {
    go: mpsc::Sender<()>,
    waiting: *mut mpsc::Receiver<()>,
}

unsafe extern "C" fn wait(receiver: *mut c_void) {
    // SAFETY: `Gate::new` gave a receiver that lives until the stream was waited for.
    let receiver = unsafe { &*receiver.cast::<mpsc::Receiver<()>>() };
    let _ = receiver.recv_timeout(std::time::Duration::from_secs(20));
}

impl Gate {
    fn new(stream: &OwnStream) -> Self {
        let (go, receiver) = mpsc::channel();
        let waiting = Box::into_raw(Box::new(receiver));
        // SAFETY: `wait` gets the receiver that it expects.
        unsafe { sys::cuLaunchHostFunc(stream.raw(), Some(wait), waiting.cast()) }.result().unwrap();
        Self { go, waiting }
    }

    fn open(self, stream: &OwnStream) {
        self.go.send(()).unwrap();
        stream.wait();
        // SAFETY: made by `new`; the stream is through.
        drop(unsafe { Box::from_raw(self.waiting) });
    }
}

#[test]
fn nothing_waits_for_a_blocked_stream() {
    let Some(device) = device() else { return };
    let (stream, mut sequence) = (OwnStream::new(), Sequence::new(2));
    let gate = Gate::new(&stream);
    sequence.enqueue(device, stream.stream());
    assert_eq!(sequence.judge.peek(), Outcome::Pending);
    gate.open(&stream);
    assert_eq!(sequence.judge.peek(), Outcome::Good);
    sequence.on_host();
    assert!(sequence.is_equal());
}

#[test]
fn a_captured_compression_is_replayed() {
    let Some(device) = device() else { return };
    let (stream, mut sequence) = (OwnStream::new(), Sequence::new(4));
    // SAFETY: the stream and what is captured are ours.
    let graph = unsafe {
        result::stream::begin_capture(stream.raw(), sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            .unwrap();
        sequence.enqueue(device, stream.stream());
        let captured = result::stream::end_capture(stream.raw()).unwrap();
        result::graph::instantiate(
            captured,
            sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH,
        )
        .unwrap()
    };
    assert!(sequence.is_equal(), "capture alone moves nothing");
    // Twice: the second compresses what the first left.
    for round in 0..2 {
        // SAFETY: the graph is ours.
        unsafe { result::graph::launch(graph, stream.raw()) }.unwrap();
        stream.wait();
        sequence.on_host();
        assert!(sequence.is_equal(), "replay {round}");
    }
    // SAFETY: ours, and done.
    unsafe { result::graph::exec_destroy(graph) }.unwrap();
}

#[test]
fn threads_race_on_streams_of_their_own() {
    let Some(device) = device() else { return };
    std::thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || {
                crate::gpu::enter();
                let stream = OwnStream::new();
                for round in 0..5 {
                    let mut sequence = Sequence::new(8 + 2 * (5 * thread + round));
                    sequence.enqueue(device, stream.stream());
                    stream.wait();
                    assert_eq!(sequence.judge.peek(), Outcome::Good);
                    sequence.on_host();
                    assert!(sequence.is_equal(), "thread {thread}, round {round}");
                }
            });
        }
    });
}

#[test]
fn the_context_of_the_thread_is_restored() {
    let Some(device) = device() else { return };
    let (stream, sequence) = (OwnStream::new(), Sequence::new(90));
    // SAFETY: no context is one, too.
    unsafe { result::ctx::set_current(std::ptr::null_mut()) }.unwrap();
    sequence.enqueue(device, stream.stream());
    assert_eq!(result::ctx::get_current().unwrap(), None);
    crate::gpu::enter();
    stream.wait();
}

#[test]
fn a_context_that_is_not_the_primary_one_is_refused() {
    if device().is_none() {
        return;
    }
    let mut other = std::ptr::null_mut();
    // SAFETY: device 0 exists; the context is destroyed below.
    let refused = unsafe {
        let ordinal = result::device::get(0).unwrap();
        sys::cuCtxCreate_v4(&raw mut other, std::ptr::null_mut(), 0, ordinal).result().unwrap();
        let refused = Device::adopt(0, other.cast());
        sys::cuCtxDestroy_v2(other).result().unwrap();
        refused
    };
    assert!(matches!(refused, Err(CudaError::ForeignContext { ordinal: 0 })));
    assert!(matches!(Device::adopt(4096, std::ptr::null_mut()), Err(CudaError::NoDevice { ordinal: 4096, .. })));
}
