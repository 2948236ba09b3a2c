//! Counting what a call puts on a stream, by capturing it into a graph that is never run.

use cudarc::driver::sys::{self, CUgraph, CUgraphNodeType, CUstreamCaptureMode};

use super::super::error::BenchError;
use super::super::machine::{Launches, Work};
use super::{Called, Cuda};

impl Cuda {
    /// Launches of both halves of a call.
    pub(super) fn count(&self, work: &mut dyn Work) -> Result<Option<Launches>, BenchError> {
        self.ready_call(work)?;
        let first = self.capture(|| work.prepare())?;
        work.abandon()?;
        work.tear_down()?;
        self.ready_call(work)?;
        work.prepare()?;
        self.wait(work)?;
        self.synchronize()?;
        let second = self.capture(|| work.commit())?;
        work.tear_down()?;
        self.synchronize()?;
        let add = |a: Launches, b: Launches| Launches {
            kernels: a.kernels + b.kernels,
            memsets: a.memsets + b.memsets,
            copies: a.copies + b.copies,
        };
        Ok(first.zip(second).map(|(first, second)| add(first, second)))
    }

    /// Nodes of the graph that a call would be; none where the driver does not take it.
    fn capture(&self, call: impl FnOnce() -> Result<(), BenchError>) -> Result<Option<Launches>, BenchError> {
        self.pool.begin_capture();
        let mut graph: CUgraph = core::ptr::null_mut();
        // SAFETY: the stream is ours, and nothing is captured on it yet.
        let begun =
            unsafe { sys::cuStreamBeginCapture_v2(self.stream, CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED) };
        if let Err(error) = begun.called("a capture") {
            self.pool.end_capture();
            return Err(error);
        }
        let called = call();
        // SAFETY: the capture began above; the graph is written.
        let ended = unsafe { sys::cuStreamEndCapture(self.stream, &mut graph) };
        self.pool.end_capture();
        if ended.result().is_err() || graph.is_null() {
            return called.map(|()| None);
        }
        let counted = called.and_then(|()| nodes(graph));
        // SAFETY: the graph is ours, and is not used any more.
        unsafe { sys::cuGraphDestroy(graph) }.called("the end of a graph")?;
        counted.map(Some)
    }
}

fn nodes(graph: CUgraph) -> Result<Launches, BenchError> {
    let mut count = 0;
    // SAFETY: the graph is valid; without room, only the count is written.
    unsafe { sys::cuGraphGetNodes(graph, core::ptr::null_mut(), &mut count) }.called("a graph's nodes")?;
    let mut nodes = vec![core::ptr::null_mut(); count];
    if count > 0 {
        // SAFETY: there is room for so many.
        unsafe { sys::cuGraphGetNodes(graph, nodes.as_mut_ptr(), &mut count) }.called("a graph's nodes")?;
    }
    let mut launches = Launches { kernels: 0, memsets: 0, copies: 0 };
    for node in nodes {
        let mut kind = CUgraphNodeType::CU_GRAPH_NODE_TYPE_EMPTY;
        // SAFETY: a node of the graph.
        unsafe { sys::cuGraphNodeGetType(node, &mut kind) }.called("a node's type")?;
        match kind {
            CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL => launches.kernels += 1,
            CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEMSET => launches.memsets += 1,
            CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEMCPY => launches.copies += 1,
            _ => {}
        }
    }
    Ok(launches)
}
