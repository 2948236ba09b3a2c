//! Compression in two halves: ask, prepare on each rank, verdict, commit on each rank.

use core::ffi::c_void;

use kvhook_abi::boundary::{self, Values};
use kvhook_abi::raw::*;

use super::{Numbers, guard, host_of, slots};
use crate::ask::{Answer, Ask};
use crate::commit::{CommitRequest, Committed, Compressed};
use crate::error::HostError;
use crate::host::{Host, event_from_raw};
use crate::prepare::PrepareRequest;
use crate::raw::*;
use crate::ticket::Verdict;
use crate::view::Layers;

/// Asks, before any data is read, whether there is something to compress, and how many rows it takes. What a plugin does
/// wrong is a keep with a reason, not an error. While a ticket of the sequence is open the answer is keep, no reason.
///
/// Thread: any; waits for a call of the first rank's instance that is under way.
/// Returns `KVHOOK_ERR_UNKNOWN_UID`.
///
/// # Safety
/// Arguments are null or as the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvhook_ask(
    host: *mut KvhookHost,
    ask: *const KvhookAsk,
    out: *mut KvhookAnswer,
    error: *mut KvhText,
) -> KvhookStatus {
    let body = || {
        // SAFETY: the caller's arguments are as the header says.
        unsafe {
            let host = host_of(host)?;
            let (ask, lengths) = read_ask(ask)?;
            let head = boundary::read(out, "out")?;
            let counts = Numbers::new(head.counts, lengths.len(), "out.counts")?;
            let answer = host.ask(&ask_of(&ask, &lengths)?)?;
            counts.write(&answer.counts);
            write_answer(out, head, &answer)
        }
    };
    // SAFETY: as above.
    unsafe { guard(error, body) }
}

/// # Safety
/// `ask` is null or as the header says.
unsafe fn read_ask(ask: *const KvhookAsk) -> Result<(KvhookAsk, Vec<u64>), HostError> {
    // SAFETY: passed on from the caller.
    unsafe {
        let ask = boundary::read(ask, "ask")?;
        let lengths = Values::<u64>::new(ask.lengths, "ask.lengths")?.iter().collect();
        Ok((ask, lengths))
    }
}

fn ask_of<'a>(ask: &KvhookAsk, lengths: &'a [u64]) -> Result<Ask<'a>, HostError> {
    Ok(Ask {
        uid: ask.uid,
        event: event_from_raw(ask.event)?,
        lengths,
        next_position: ask.next_position,
        shared_rows: ask.shared_rows,
        published_rows: ask.published_rows,
    })
}

/// # Safety
/// `out` is as the header says.
unsafe fn write_answer(out: *mut KvhookAnswer, head: KvhookAnswer, answer: &Answer) -> Result<(), HostError> {
    let answer = KvhookAnswer { decision: answer.decision, reason: answer.reason, ..head };
    // SAFETY: passed on from the caller.
    unsafe { boundary::write(out, &answer, "out")? };
    Ok(())
}

/// Prepares sequences on one rank: each plugin instance is called once for all its sequences of one event, its plans are
/// checked completely and copied, and everything that a commit needs is allocated. The rows are read and not written.
/// `sequences` are `KvhookPrepareSequence` elements, whose `ticket` and `reason` are filled. A sequence that is kept,
/// whatever its plugin did wrong, gets ticket 0 and a reason; so does one that is not live any more
/// (`KVHOOK_REASON_DROPPED`). The first rank opens the ticket; ranks that come later join it while event and next position
/// are the same. A rank that keeps drops it for all. On a device the work is enqueued on `stream`, nothing waits for it, and
/// the rows must not be written before it is done.
///
/// Thread: the rank's; waits for calls of its instances that are under way. Rows must not be written during the call.
/// Returns `KVHOOK_ERR_VIEW` when a layer is not one that the row formula describes, or differs from the model: then every
/// sequence of the call is kept (`KVH_REASON_UNSUPPORTED`).
///
/// # Safety
/// Arguments are null or as the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvhook_prepare(
    host: *mut KvhookHost,
    rank: u32,
    sequences: KvhArrayMut,
    stream: *mut c_void,
    error: *mut KvhText,
) -> KvhookStatus {
    let body = || {
        // SAFETY: the caller's arguments are as the header says.
        unsafe {
            let host = host_of(host)?;
            let model = host.check_rank(rank)?;
            let slots = slots::<KvhookPrepareSequence>(sequences, "sequences")?;
            let mut heads = Vec::with_capacity(slots.len());
            for &slot in &slots {
                let head = boundary::read(slot, "sequences")?;
                heads.push((event_from_raw(head.event)?, head));
            }
            let requests = heads
                .iter()
                .map(|(event, head)| {
                    Ok(PrepareRequest {
                        uid: head.uid,
                        event: *event,
                        fresh: head.fresh != 0,
                        moves_rows: false,
                        layers: read_layers(host, model, head.layers, "sequences.layers")?,
                        next_position: head.next_position,
                        shared_rows: head.shared_rows,
                        published_rows: head.published_rows,
                    })
                })
                .collect::<Result<Vec<_>, HostError>>();
            let refused = match requests {
                Ok(requests) => {
                    let prepared = host.prepare(rank, &requests, stream)?;
                    for (&slot, prepared) in slots.iter().zip(&prepared) {
                        write_prepared(slot, prepared.ticket, prepared.reason);
                    }
                    return Ok(());
                }
                Err(refused) => refused,
            };
            for (&slot, (event, head)) in slots.iter().zip(&heads) {
                host.refuse_prepare(rank, head.uid, *event, head.next_position, &refused);
                write_prepared(slot, 0, KVH_REASON_UNSUPPORTED);
            }
            Err(refused)
        }
    };
    // SAFETY: as above.
    unsafe { guard(error, body) }
}

/// # Safety
/// `slot` was read as a whole.
unsafe fn write_prepared(slot: *mut KvhookPrepareSequence, ticket: u64, reason: KvhookReason) {
    // SAFETY: passed on from the caller.
    unsafe {
        (&raw mut (*slot).ticket).write(ticket);
        (&raw mut (*slot).reason).write(reason);
    }
}

/// # Safety
/// The array is as the header says.
unsafe fn read_layers(host: &Host, rank: usize, layers: KvhArray, name: &'static str) -> Result<Layers, HostError> {
    // SAFETY: passed on from the caller.
    unsafe { Layers::read(layers, name, &host.models[rank], host.offers.block_size) }
}

/// The state of a ticket: pending until every rank has prepared, then ready or dropped. A dropped ticket's reason is
/// known for the last 4096 of them. `out.counts` are lent by the engine, one for each layer or none; with counts that
/// depend on data they are the most of any rank. Never waits.
///
/// Thread: any.
/// Returns `KVHOOK_ERR_UNKNOWN_TICKET` for a number that was never given, or whose ticket is committed on every rank.
///
/// # Safety
/// Arguments are null or as the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvhook_verdict(
    host: *mut KvhookHost,
    ticket: u64,
    out: *mut KvhookVerdict,
    error: *mut KvhText,
) -> KvhookStatus {
    let body = || {
        // SAFETY: the caller's arguments are as the header says.
        unsafe {
            let host = host_of(host)?;
            let head = boundary::read(out, "out")?;
            let layers = host.models[0].layers().len();
            let numbers = Numbers::new(head.counts, layers, "out.counts")?;
            let mut answer = KvhookVerdict {
                verdict: KVHOOK_VERDICT_PENDING,
                reason: KVH_REASON_NONE,
                movement: 0,
                rewrites: 0,
                planned_position: 0,
                ..head
            };
            match host.verdict(ticket)? {
                Verdict::Pending => {}
                Verdict::Dropped(reason) => {
                    (answer.verdict, answer.reason) = (KVHOOK_VERDICT_DROPPED, reason);
                }
                Verdict::Ready { movement, rewrites, planned_position, counts } => {
                    (answer.verdict, answer.movement) = (KVHOOK_VERDICT_READY, movement);
                    answer.rewrites = rewrites.into();
                    answer.planned_position = planned_position;
                    numbers.write(&counts);
                }
            }
            boundary::write(out, &answer, "out")?;
            Ok(())
        }
    };
    // SAFETY: as above.
    unsafe { guard(error, body) }
}

/// Drops a ticket: the sequence stays as it is. `reason` is counted: `KVH_REASON_NO_ROOM` where the engine found no rows.
///
/// Thread: any.
/// Returns `KVHOOK_ERR_UNKNOWN_TICKET`, `KVHOOK_ERR_DROPPED` the second time, `KVHOOK_ERR_INVALID_ARGUMENT` once a rank has
/// begun to commit.
///
/// # Safety
/// Arguments are null or as the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvhook_drop(
    host: *mut KvhookHost,
    ticket: u64,
    reason: KvhookReason,
    error: *mut KvhText,
) -> KvhookStatus {
    // SAFETY: the caller's arguments are as the header says.
    let body = || unsafe { host_of(host)? }.drop_ticket(ticket, reason);
    // SAFETY: as above.
    unsafe { guard(error, body) }
}

/// Carries out a ticket on one rank: kept rows move, and rows that were appended since follow unchanged behind them.
/// Everything is checked first; on an error nothing was written, and the ticket is dropped unless another rank has moved
/// its rows (then this rank must try again).
///
/// How the rows move is the verdict's: in place; to `fresh`, where each layer's `length` is the room for rows, and a layer
/// that is kept whole may have none (its rows then stay where they are); or, for an edit of the block tables, not at all:
/// `layers` are then described with the old tables, and the engine edits them afterwards.
/// After the last rank's commit the ticket is closed. New positions are those of `kvhook_positions`.
///
/// Thread: the rank's. Nobody else uses the sequence's rows during the call.
/// Returns `KVHOOK_ERR_UNKNOWN_TICKET`, `KVHOOK_ERR_NOT_READY`, `KVHOOK_ERR_DROPPED`, `KVHOOK_ERR_NO_ROOM`,
/// `KVHOOK_ERR_VIEW`; `KVHOOK_ERR_INVALID_ARGUMENT` also for rows that were cut, for ranks that differ in
/// `next_position`, and for rows appended to a plan that moves positions.
///
/// # Safety
/// Arguments are null or as the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvhook_commit(
    host: *mut KvhookHost,
    rank: u32,
    commit: *mut KvhookCommit,
    error: *mut KvhText,
) -> KvhookStatus {
    let body = || {
        // SAFETY: the caller's arguments are as the header says.
        unsafe {
            let host = host_of(host)?;
            let model = host.check_rank(rank)?;
            let head = boundary::read(commit, "commit")?;
            let lengths = Numbers::new(head.lengths, host.models[model].layers().len(), "commit.lengths")?;
            let views = (|| {
                Ok::<_, HostError>(CommitRequest {
                    ticket: head.ticket,
                    layers: read_layers(host, model, head.layers, "commit.layers")?,
                    fresh: read_fresh(host, model, &head)?,
                    next_position: head.next_position,
                    stream: head.stream,
                })
            })();
            let committed = match views {
                Ok(request) => host.commit(rank, &request)?,
                Err(refused) => {
                    // A ticket that another rank is committing stays.
                    let _ = host.drop_ticket(head.ticket, KVH_REASON_UNSUPPORTED);
                    return Err(refused);
                }
            };
            write_committed(commit, &lengths, &committed);
            Ok(())
        }
    };
    // SAFETY: as above.
    unsafe { guard(error, body) }
}

/// # Safety
/// As the header says.
unsafe fn read_fresh(host: &Host, rank: usize, commit: &KvhookCommit) -> Result<Option<Layers>, HostError> {
    match commit.fresh.count {
        0 => Ok(None),
        // SAFETY: passed on from the caller.
        _ => Ok(Some(unsafe { read_layers(host, rank, commit.fresh, "commit.fresh")? })),
    }
}

/// # Safety
/// `commit` was read as a whole, and `lengths` are its array.
unsafe fn write_committed(commit: *mut KvhookCommit, lengths: &Numbers, committed: &Committed) {
    // SAFETY: passed on from the caller.
    unsafe {
        lengths.write(&committed.lengths);
        (&raw mut (*commit).new_next_position).write(committed.next_position);
    }
}

/// What a ticket whose movement is `KVHOOK_MOVE_TABLE` keeps of each layer's block table. `edits` are
/// `KvhookTableEdit` elements, one for each layer. `blocks` are the host's memory: valid until the last rank's commit of
/// the ticket returns, or the ticket is dropped.
///
/// Thread: any.
/// Returns `KVHOOK_ERR_UNKNOWN_TICKET`, `KVHOOK_ERR_NOT_READY`, `KVHOOK_ERR_DROPPED`, `KVHOOK_ERR_INVALID_ARGUMENT` for
/// another movement.
///
/// # Safety
/// Arguments are null or as the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvhook_table_edit(
    host: *mut KvhookHost,
    ticket: u64,
    edits: KvhArrayMut,
    error: *mut KvhText,
) -> KvhookStatus {
    let body = || {
        // SAFETY: the caller's arguments are as the header says.
        unsafe {
            let slots = slots::<KvhookTableEdit>(edits, "edits")?;
            host_of(host)?.table_edit(ticket, |table| {
                if slots.len() != table.len() {
                    return Err(HostError::Argument(format!(
                        "`edits` has {} elements; the model has {} layers",
                        slots.len(),
                        table.len()
                    )));
                }
                for (&slot, blocks) in slots.iter().zip(table) {
                    let edit = KvhookTableEdit {
                        struct_size: size_of::<KvhookTableEdit>(),
                        blocks: blocks.as_ptr(),
                        count: blocks.len() as u64,
                    };
                    boundary::write(slot, &edit, "edits")?;
                }
                Ok(())
            })
        }
    };
    // SAFETY: as above.
    unsafe { guard(error, body) }
}

/// Both halves in one call, for an engine with one rank on the CPU: asks, prepares and commits. Of `commit`, `layers` and
/// `fresh` are read (without `fresh`, rows move in place; block tables are not edited), `lengths` and
/// `new_next_position` are filled, also for a keep. `answer.decision` is `KVHOOK_DECISION_KEEP` with a reason, or how the
/// rows moved; its counts are filled with the new lengths.
///
/// Thread: the rank's. Nobody else uses the sequence's rows during the call.
/// Returns `KVHOOK_ERR_UNKNOWN_UID`, `KVHOOK_ERR_NO_ROOM`, `KVHOOK_ERR_VIEW`.
///
/// # Safety
/// Arguments are null or as the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvhook_compress(
    host: *mut KvhookHost,
    ask: *const KvhookAsk,
    commit: *mut KvhookCommit,
    answer: *mut KvhookAnswer,
    error: *mut KvhText,
) -> KvhookStatus {
    let body = || {
        // SAFETY: the caller's arguments are as the header says.
        unsafe {
            let host = host_of(host)?;
            let (ask, lengths) = read_ask(ask)?;
            let head = boundary::read(commit, "commit")?;
            let answer_head = boundary::read(answer, "answer")?;
            let out = Numbers::new(head.lengths, lengths.len(), "commit.lengths")?;
            let counts = Numbers::new(answer_head.counts, lengths.len(), "answer.counts")?;
            let layers = || read_layers(host, 0, head.layers, "commit.layers");
            layers()?;
            let fresh = read_fresh(host, 0, &head)?;
            let done = host.compress(&ask_of(&ask, &lengths)?, layers, fresh, head.stream)?;
            let (decision, reason, committed) = match done {
                Compressed::Kept(reason) => {
                    let committed = Committed { lengths, next_position: ask.next_position };
                    (KVHOOK_DECISION_KEEP, reason, committed)
                }
                Compressed::Done { movement: KVHOOK_MOVE_FRESH, committed } => {
                    (KVHOOK_DECISION_FRESH, KVH_REASON_NONE, committed)
                }
                Compressed::Done { committed, .. } => (KVHOOK_DECISION_IN_PLACE, KVH_REASON_NONE, committed),
            };
            write_committed(commit, &out, &committed);
            counts.write(&committed.lengths);
            write_answer(answer, answer_head, &Answer { decision, reason, counts: Vec::new() })
        }
    };
    // SAFETY: as above.
    unsafe { guard(error, body) }
}

/// The engine got memory back that a commit of this sequence made free: for the arm's figures.
///
/// Thread: any.
/// Returns `KVHOOK_ERR_UNKNOWN_UID`.
///
/// # Safety
/// Arguments are null or as the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvhook_freed(
    host: *mut KvhookHost,
    uid: u64,
    bytes: u64,
    error: *mut KvhText,
) -> KvhookStatus {
    // SAFETY: the caller's arguments are as the header says.
    let body = || unsafe { host_of(host)? }.freed(uid, bytes);
    // SAFETY: as above.
    unsafe { guard(error, body) }
}
