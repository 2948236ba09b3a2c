//! Calls of the host in any order, on 1 to 3 ranks, with sequences, tickets and arms that are live, gone or unknown. Every
//! cache holds what a plain model of it says, `on_free` comes once, and nothing is left when the host is gone.

#![no_main]

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock};

use arbitrary::{Arbitrary, Unstructured};
use kvhook_abi::raw::*;
use kvhook_fuzz::mock::plugin::{Script, Style, chosen, rewritten_tag};
use kvhook_fuzz::mock::{ALL, Cache, Engine, SMALL, Shape, call as checked};
use kvhook_fuzz::rows::{Before, room};
use kvhook_host::c_api::*;
use kvhook_host::host::Host;
use kvhook_host::raw::*;
use kvhook_host::spec::ArmSpec;
use libfuzzer_sys::fuzz_target;

const BLOCK: usize = 4;
const ARMS: [&str; 3] = ["first", "second", "third"];
/// Rows that a sequence begins with room for.
const MOST_ROWS: u64 = 60;
const MOST_SEQUENCES: usize = 8;

#[derive(Debug)]
struct Input {
    ranks: u8,
    paged: bool,
    calls: Vec<Call>,
}

impl<'a> Arbitrary<'a> for Input {
    fn arbitrary(bytes: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        let mut input = Self { ranks: bytes.arbitrary()?, paged: bytes.arbitrary()?, calls: Vec::new() };
        while !bytes.is_empty() && input.calls.len() < 50 {
            input.calls.push(bytes.arbitrary()?);
        }
        Ok(input)
    }
}

/// Sequences are named by their place among all that ever began, tickets by their sequence.
#[derive(Arbitrary, Debug)]
enum Call {
    Begin {
        arm: u8,
        prompt: u8,
    },
    Append {
        sequence: u8,
        tokens: u8,
    },
    Cut {
        sequence: u8,
        tokens: u8,
    },
    Fork {
        sequence: u8,
    },
    Free {
        sequence: u8,
        reason: u8,
    },
    FreeUnknown {
        uid: u64,
    },
    Reset,
    Attend {
        sequence: u8,
        rank: u8,
        tokens: u8,
        decode: bool,
    },
    Ask {
        sequence: u8,
        grown: bool,
        shared: u8,
    },
    Prepare {
        sequences: [u8; 2],
        rank: u8,
        grown: bool,
        fresh: bool,
    },
    PrepareAll {
        sequence: u8,
        fresh: bool,
    },
    Commit {
        sequence: u8,
        rank: u8,
    },
    CommitAll {
        sequence: u8,
    },
    Compress {
        sequence: u8,
        grown: bool,
    },
    Drop {
        sequence: u8,
        reason: i8,
    },
    UnknownTicket {
        ticket: u64,
        rank: u8,
    },
    ArmSet {
        arm: u8,
        weight: u8,
        min_tokens: u8,
    },
    ArmWeight {
        arm: u8,
        weight: f64,
    },
    ArmRemove {
        arm: u8,
    },
    Figures {
        arm: u8,
    },
    /// How all plugins plan from now on.
    Style {
        style: u8,
    },
    Fail {
        script: u8,
        hook: u8,
        status: u8,
    },
    Refuse {
        allocation: u8,
    },
}

/// Each plays one generation of instances in a run, so that `on_free` can be counted.
static SCRIPTS: LazyLock<Vec<(Arc<Script>, String)>> = LazyLock::new(|| {
    let scripts = [
        Script::default(),
        Script { keeps_state: true, must: KVH_CAN_STATE, ..Script::default() },
        Script { phases: KVH_PHASE_PREFILL, window: 3, ..Script::default() },
        Script { phases: KVH_PHASE_PREFILL | KVH_PHASE_DECODE, grown_every: 4, ..Script::default() },
        Script { grown_every: 1, min_tokens: 6, ..Script::default() },
        Script { keeps_state: true, ..Script::default() },
    ];
    let register = |script: Script| {
        let script = Arc::new(script);
        let config = script.register();
        (script, config)
    };
    scripts.into_iter().map(register).collect()
});

/// (position, tag) of each row, by layer and head.
type Rows = Vec<Vec<Vec<(u64, u64)>>>;

/// What a rank's commit will leave of the planned rows.
struct Plan {
    kept: Rows,
    planned: Vec<usize>,
    moved: bool,
    committed: bool,
}

struct Open {
    ticket: u64,
    plans: Vec<Option<Plan>>,
    fresh: Cache,
}

struct Sequence {
    cache: Cache,
    live: bool,
    open: Option<Open>,
    /// Ranks on which a hook was surely called.
    called: HashSet<u32>,
}

impl Sequence {
    fn is_committing(&self) -> bool {
        let plans = self.open.iter().flat_map(|open| open.plans.iter().flatten());
        plans.into_iter().any(|plan| plan.committed)
    }

    fn has_room_for(&self, tokens: u64) -> bool {
        let fits = |rank| self.cache.lengths(rank).iter().all(|length| length + tokens <= room(&self.cache, rank));
        (0..self.cache.shape.ranks).all(fits)
    }
}

/// A host, and the model of all that it does.
struct World {
    engine: Engine,
    sequences: Vec<Sequence>,
    /// Scripts that play, in the order in which they came.
    playing: usize,
    /// The script of each arm.
    arms: [Option<usize>; ARMS.len()],
    style: Style,
    /// Some hook was told to panic: poisoned instances hear nothing any more.
    may_be_poisoned: bool,
}

fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().expect("no panic is survived")
}

fn style(number: u8) -> Style {
    match number % 7 {
        0 => Style::Heads,
        1 => Style::Shared,
        2 => Style::Ranges,
        3 => Style::Blocks(BLOCK as u64),
        4 => Style::Rewrite,
        5 => Style::Rerotate,
        _ => Style::Keep(KVH_REASON_OTHER),
    }
}

fn event(grown: bool) -> i32 {
    if grown { KVHOOK_EVENT_GROWN } else { KVHOOK_EVENT_PREFILL_DONE }
}

impl World {
    fn new(input: &Input) -> Self {
        for (script, _) in SCRIPTS.iter() {
            lock(&script.freed).clear();
            *lock(&script.style) = Style::Heads;
            for status in [&script.bound_status, &script.prepare_status, &script.attention_status] {
                *lock(status) = KVH_OK;
            }
        }
        let shape = Shape {
            ranks: 1 + usize::from(input.ranks % 3),
            block_size: if input.paged { BLOCK } else { 0 },
            can: ALL & !KVH_CAN_DATA_COUNTS,
            ..SMALL
        };
        let engine = Engine::new(shape);
        Self {
            engine,
            sequences: Vec::new(),
            playing: 0,
            arms: [None; ARMS.len()],
            style: Style::Heads,
            may_be_poisoned: false,
        }
    }

    fn rank(&self, rank: u8) -> usize {
        usize::from(rank) % self.engine.shape.ranks
    }

    fn place(&self, sequence: u8) -> Option<usize> {
        usize::from(sequence).checked_rem(self.sequences.len())
    }

    fn began(&mut self, mut cache: Cache, uid: u64) {
        cache.uid = uid;
        assert!(self.sequences.iter().all(|other| other.cache.uid != uid), "uid {uid} was used before");
        self.sequences.push(Sequence { cache, live: true, open: None, called: HashSet::new() });
    }

    fn make(&mut self, call: &Call) {
        match *call {
            Call::Begin { .. } | Call::Fork { .. } if self.sequences.len() == MOST_SEQUENCES => {}
            Call::Begin { arm, prompt } => self.begin(arm, prompt),
            Call::ArmSet { arm, weight, min_tokens } => self.arm_set(arm, weight, min_tokens),
            Call::ArmWeight { arm, weight } => {
                let arm = usize::from(arm) % ARMS.len();
                let name = KvhStr::new(ARMS[arm]);
                // SAFETY: the host is live.
                let set = checked(|error| unsafe { kvhook_arm_weight(self.engine.raw, name, weight, error) });
                let good = self.arms[arm].is_some() && weight.is_finite() && weight >= 0.0;
                assert_eq!(set.is_ok(), good, "weight {weight}");
            }
            Call::ArmRemove { arm } => {
                let arm = usize::from(arm) % ARMS.len();
                let name = KvhStr::new(ARMS[arm]);
                // SAFETY: the host is live.
                let removed = checked(|error| unsafe { kvhook_arm_remove(self.engine.raw, name, error) });
                assert_eq!(removed.is_ok(), self.arms[arm].take().is_some());
            }
            Call::Figures { arm } => self.figures(usize::from(arm) % ARMS.len()),
            Call::FreeUnknown { uid } if self.sequences.iter().all(|sequence| sequence.cache.uid != uid) => {
                let freed = self.engine.free(uid, KVH_FREE_FINISHED);
                assert_eq!(freed.expect_err("nobody has this uid").0, KVHOOK_ERR_UNKNOWN_UID);
            }
            Call::FreeUnknown { .. } => {}
            Call::Reset => {
                // SAFETY: the host is live.
                let reset = checked(|error| unsafe { kvhook_reset(self.engine.raw, core::ptr::null_mut(), error) });
                reset.expect("a reset cannot fail");
                for place in 0..self.sequences.len() {
                    self.ended(place);
                }
            }
            Call::UnknownTicket { ticket, rank } => self.unknown_ticket(ticket, rank),
            Call::Style { style: number } => {
                self.style = style(number);
                SCRIPTS.iter().for_each(|(script, _)| *lock(&script.style) = self.style);
            }
            Call::Fail { script, hook, status } => {
                let script = &SCRIPTS[usize::from(script) % SCRIPTS.len()].0;
                let hooks = [&script.bound_status, &script.prepare_status, &script.attention_status];
                let statuses = [KVH_OK, KVH_ERR_INTERNAL, KVH_ERR_OUT_OF_MEMORY, KVH_ERR_PANIC];
                let status = statuses[usize::from(status) % statuses.len()];
                self.may_be_poisoned |= status == KVH_ERR_PANIC;
                *lock(hooks[usize::from(hook) % hooks.len()]) = status;
            }
            Call::Refuse { allocation } => {
                let watch = &self.engine.watch;
                watch.refuse.store(watch.made.load(Ordering::SeqCst) + i64::from(allocation % 8), Ordering::SeqCst);
            }
            Call::Prepare { sequences, rank, grown, fresh } => {
                let places = sequences.iter().filter_map(|&sequence| self.place(sequence)).collect::<Vec<_>>();
                if !places.is_empty() {
                    self.prepare(&places, self.rank(rank), grown, fresh);
                }
            }
            Call::Append { sequence, .. }
            | Call::Cut { sequence, .. }
            | Call::Fork { sequence }
            | Call::Free { sequence, .. }
            | Call::Attend { sequence, .. }
            | Call::Ask { sequence, .. }
            | Call::PrepareAll { sequence, .. }
            | Call::Commit { sequence, .. }
            | Call::CommitAll { sequence }
            | Call::Compress { sequence, .. }
            | Call::Drop { sequence, .. } => {
                if let Some(place) = self.place(sequence) {
                    self.make_of(place, call);
                }
            }
        }
    }

    fn make_of(&mut self, place: usize, call: &Call) {
        let sequence = &mut self.sequences[place];
        let uid = sequence.cache.uid;
        match *call {
            Call::Append { tokens, .. } => {
                let tokens = u64::from(tokens % 12);
                if sequence.live && !sequence.is_committing() && sequence.has_room_for(tokens) {
                    sequence.cache.append(tokens);
                }
            }
            Call::Cut { tokens, .. } => self.cut(place, u64::from(tokens % 12)),
            Call::Fork { .. } => match self.engine.fork(uid) {
                Ok(fork) => {
                    assert!(sequence.live && !sequence.is_committing());
                    sequence.open = None;
                    let cache = sequence.cache.clone();
                    self.began(cache, fork);
                }
                Err((status, _)) => {
                    let known = [KVHOOK_ERR_FORK_REFUSED, KVHOOK_ERR_INVALID_ARGUMENT].contains(&status);
                    assert!(if sequence.live { known } else { status == KVHOOK_ERR_UNKNOWN_UID });
                }
            },
            Call::Free { reason, .. } => {
                let reason = i32::from(reason % 5);
                match self.engine.free(uid, reason) {
                    Ok(()) => {
                        assert!(sequence.live, "sequence {uid} was freed twice");
                        self.ended(place);
                    }
                    Err((status, _)) if reason > KVH_FREE_RESET => assert_eq!(status, KVHOOK_ERR_INVALID_ARGUMENT),
                    Err((status, _)) => assert!(!sequence.live && status == KVHOOK_ERR_UNKNOWN_UID),
                }
            }
            Call::Attend { rank, tokens, decode, .. } => {
                let rank = usize::from(rank) % self.engine.shape.ranks;
                let tokens = u64::from(tokens % 8).min(sequence.cache.prompt_length);
                let first = sequence.cache.prompt_length - tokens;
                let phase = if decode { KVH_PHASE_DECODE } else { KVH_PHASE_PREFILL };
                self.engine.attend(&[&sequence.cache], rank, first, tokens, phase);
            }
            Call::Ask { grown, shared, .. } => {
                let asked = self.engine.ask_shared(&sequence.cache, event(grown), u64::from(shared % 16), 0);
                assert_eq!(asked.is_ok(), sequence.live);
            }
            Call::PrepareAll { fresh, .. } => {
                for rank in 0..self.engine.shape.ranks {
                    self.prepare(&[place], rank, false, fresh);
                }
            }
            Call::Commit { rank, .. } => self.commit(place, self.rank(rank)),
            Call::CommitAll { .. } => (0..self.engine.shape.ranks).for_each(|rank| self.commit(place, rank)),
            Call::Compress { grown, .. } => self.compress(place, grown),
            Call::Drop { reason, .. } => {
                let Some(open) = &sequence.open else { return };
                let committing = sequence.is_committing();
                let dropped = self.engine.drop_ticket(open.ticket, reason.into());
                assert!(!(dropped.is_ok() && committing), "a ticket was dropped of which a rank is committed");
            }
            _ => {}
        }
    }

    fn begin(&mut self, arm: u8, prompt: u8) {
        let name = ["first", "second", "third", "", "none", "missing"][usize::from(arm) % 6];
        let prompt = u64::from(prompt % 32);
        let known = ARMS.iter().position(|known| *known == name).is_none_or(|arm| self.arms[arm].is_some());
        let began = self.engine.begin_on(name, "", prompt);
        assert_eq!(began.is_ok(), known && name != "missing", "arm {name:?}");
        let Ok(began) = began else { return };
        assert!(began.max_prefix_hit <= prompt);
        if began.uid != 0 {
            let mut cache = Cache::new(self.engine.shape, began.uid, MOST_ROWS as usize);
            cache.append(prompt);
            self.began(cache, began.uid);
        }
    }

    fn arm_set(&mut self, arm: u8, weight: u8, min_tokens: u8) {
        let Some((_, config)) = SCRIPTS.get(self.playing) else { return };
        let arm = usize::from(arm) % ARMS.len();
        let spec = ArmSpec {
            weight: weight.into(),
            min_tokens: u64::from(min_tokens % 16),
            ..ArmSpec::new(ARMS[arm], "scripted", config)
        };
        // SAFETY: the host is live, and the entry is the mock's.
        let set = unsafe { (*self.engine.raw.cast::<Host>()).arm_set_entry(&spec, kvhook_fuzz::mock::plugin::entry()) };
        set.expect("everything is offered");
        self.arms[arm] = Some(self.playing);
        self.playing += 1;
    }

    fn figures(&self, arm: usize) {
        let raw = self.engine.raw;
        if self.arms[arm].is_some() {
            let figures = self.engine.figures(ARMS[arm]).0;
            assert!(figures.live <= figures.sequences && figures.entries_after <= figures.entries_before);
        }
        let mut buffer = [0u8; 64];
        let mut text = KvhText::over(&mut buffer);
        // SAFETY: the host is live, the text has room for what it says.
        let written = checked(|error| unsafe { kvhook_figures_json(raw, &mut text, error) });
        assert!(written.is_ok() || text.length > buffer.len());
        let mut buffer = vec![0u8; 1 << 16];
        let mut text = KvhText::over(&mut buffer);
        // SAFETY: as above.
        checked(|error| unsafe { kvhook_figures_prometheus(raw, &mut text, error) }).expect("there is room");
    }

    fn cut(&mut self, place: usize, tokens: u64) {
        let sequence = &mut self.sequences[place];
        let least = (0..self.engine.shape.ranks).flat_map(|rank| sequence.cache.lengths(rank)).min().unwrap_or(0);
        if tokens > least.min(sequence.cache.next_position) {
            return;
        }
        // Ranks that have not all committed have different lengths, for which there is no cut.
        let mut cut = sequence.cache.clone();
        cut.truncate(tokens);
        match self.engine.cut(&cut) {
            Ok(()) => {
                assert!(sequence.live && !sequence.is_committing());
                sequence.cache = cut;
            }
            Err((status, _)) => {
                assert_eq!(status, if sequence.live { KVHOOK_ERR_INVALID_ARGUMENT } else { KVHOOK_ERR_UNKNOWN_UID });
            }
        }
    }

    fn ended(&mut self, place: usize) {
        let sequence = &mut self.sequences[place];
        sequence.live = false;
        sequence.open = None;
        let uid = sequence.cache.uid;
        for &rank in sequence.called.iter().filter(|_| !self.may_be_poisoned) {
            let told = SCRIPTS.iter().any(|(script, _)| script.frees_of(uid).iter().any(|free| free.0 == rank));
            assert!(told, "rank {rank} was not told that sequence {uid} ended");
        }
    }

    fn prepare(&mut self, places: &[usize], rank: usize, grown: bool, fresh: bool) {
        let caches: Vec<_> = places.iter().map(|&place| &self.sequences[place].cache).collect();
        let before: Vec<_> = caches.iter().map(|cache| Before::of(cache)).collect();
        let answers = self.engine.prepare_all(rank, &caches, event(grown), fresh, 0).expect("a good call");
        for ((&place, before), (ticket, _)) in places.iter().zip(before).zip(answers) {
            let sequence = &mut self.sequences[place];
            before.assert_unchanged(&sequence.cache, "prepare");
            if ticket == 0 {
                continue;
            }
            assert!(sequence.live, "a ticket for a sequence that was freed");
            sequence.called.insert(rank as u32);
            if sequence.open.as_ref().is_none_or(|open| open.ticket != ticket) {
                assert!(!sequence.is_committing(), "a second ticket while the first is committed");
                let fresh = Cache::new(self.engine.shape, sequence.cache.uid, MOST_ROWS as usize);
                let plans = (0..self.engine.shape.ranks).map(|_| None).collect();
                sequence.open = Some(Open { ticket, plans, fresh });
            }
            let plan = self.planned(place, rank);
            if let Some(open) = &mut self.sequences[place].open {
                open.plans[rank] = Some(plan);
            }
        }
    }

    /// What the plugin's plan, made just now, keeps on a rank.
    fn planned(&self, place: usize, rank: usize) -> Plan {
        let cache = &self.sequences[place].cache;
        let style = self.style;
        let rows = &cache.rows[rank];
        let of_head = |layer: usize, head: usize| {
            let old = &rows[layer][head];
            let length = old.len() as u64;
            let key = [cache.uid, cache.epoch, rank as u64, layer as u64];
            let kept = chosen(style, key, head as u64, length, (length / 2).max(1));
            let row = |(place, row): (u64, u64)| {
                let new = rewritten_tag(cache.uid, rank as u64, layer as u64, head as u64, place);
                match style {
                    Style::Rewrite => (old[row as usize].0, new),
                    Style::Rerotate => (place, new),
                    _ => old[row as usize],
                }
            };
            (0..).zip(kept).map(row).collect::<Vec<_>>()
        };
        Plan {
            kept: (0..rows.len())
                .map(|layer| (0..rows[layer].len()).map(|head| of_head(layer, head)).collect())
                .collect(),
            planned: rows.iter().map(|heads| heads[0].len()).collect(),
            moved: style == Style::Rerotate,
            committed: false,
        }
    }

    /// Commits on one rank if the verdict says so; else the commit must fail. Compares with the model.
    fn commit(&mut self, place: usize, rank: usize) {
        let Self { engine, sequences, .. } = self;
        let Sequence { cache, open: of_sequence, .. } = &mut sequences[place];
        let Some(open) = of_sequence else { return };
        let before = Before::of(cache);
        let (verdict, _, movement, _) = engine.verdict(open.ticket).expect("it was given, and is not committed");
        let fresh = (movement == KVHOOK_MOVE_FRESH).then_some(&open.fresh);
        if verdict != KVHOOK_VERDICT_READY {
            assert!(verdict == KVHOOK_VERDICT_DROPPED || open.plans.iter().any(Option::is_none));
            let expected = if verdict == KVHOOK_VERDICT_PENDING { KVHOOK_ERR_NOT_READY } else { KVHOOK_ERR_DROPPED };
            let committed = engine.commit_rank(rank, cache, open.ticket, fresh);
            assert_eq!(committed.expect_err("it is not ready").0, expected);
            if verdict == KVHOOK_VERDICT_DROPPED {
                *of_sequence = None;
            }
            return before.assert_unchanged(cache, "a ticket that is not ready");
        }
        let moved: Vec<_> = open.plans.iter().map(|plan| plan.as_ref().expect("every rank has a plan").moved).collect();
        assert!(moved.iter().all(|other| *other == moved[0]), "ranks disagree on the next position");
        let edits = (movement == KVHOOK_MOVE_TABLE).then(|| engine.table_edit(open.ticket).expect("an edit"));
        let committed = engine.commit_rank(rank, cache, open.ticket, fresh);
        let plan = open.plans[rank].as_mut().expect("every rank has a plan");
        let late = cache.rows[rank][0][0].len().saturating_sub(plan.planned[0]);
        if plan.committed || (plan.moved && late > 0) {
            assert_eq!(committed.expect_err("it cannot be committed").0, KVHOOK_ERR_INVALID_ARGUMENT);
            return before.assert_unchanged(cache, "a commit that failed");
        }
        let (lengths, next_position) = committed.expect("a ticket that is ready");
        match movement {
            KVHOOK_MOVE_IN_PLACE => before.assert_only_own_rows_changed(cache, rank, 0),
            _ => before.assert_unchanged(cache, "a commit that writes elsewhere"),
        }
        for (layer, heads) in cache.rows[rank].iter_mut().enumerate() {
            for (head, rows) in heads.iter_mut().enumerate() {
                let appended = rows.split_off(plan.planned[layer]);
                *rows = plan.kept[layer][head].iter().copied().chain(appended).collect();
            }
        }
        if movement == KVHOOK_MOVE_FRESH {
            core::mem::swap(&mut cache.stores[rank], &mut open.fresh.stores[rank]);
        }
        for ((store, kept), planned) in cache.stores[rank].iter_mut().zip(edits.iter().flatten()).zip(&plan.planned) {
            let later = store.table.split_off(planned.div_ceil(BLOCK));
            store.table = kept.iter().map(|&block| store.table[block as usize]).chain(later).collect();
        }
        plan.committed = true;
        assert_eq!(lengths, cache.lengths(rank));
        assert_eq!(next_position, if plan.moved { lengths[0] } else { cache.next_position });
        if open.plans.iter().flatten().all(|plan| plan.committed) {
            assert_eq!(engine.verdict(open.ticket).expect_err("it is carried out").0, KVHOOK_ERR_UNKNOWN_TICKET);
            cache.epoch += 1;
            cache.next_position = next_position;
            *of_sequence = None;
        }
        engine.verify(cache);
    }

    fn compress(&mut self, place: usize, grown: bool) {
        let sequence = &mut self.sequences[place];
        // The mock's own model of it knows no moved positions.
        if self.engine.shape.ranks > 1 || !sequence.live || self.style == Style::Rerotate {
            return;
        }
        let (decision, _) = self.engine.compress(&mut sequence.cache, &SCRIPTS[0].0, event(grown));
        if decision != KVHOOK_DECISION_KEEP {
            sequence.called.insert(0);
        }
        self.engine.verify(&sequence.cache);
    }

    fn unknown_ticket(&self, ticket: u64, rank: u8) {
        let is_open = |sequence: &Sequence| sequence.open.as_ref().is_some_and(|open| open.ticket == ticket);
        let Some(first) = self.sequences.first().filter(|_| !self.sequences.iter().any(is_open)) else { return };
        let before = Before::of(&first.cache);
        let rank = usize::from(rank) % self.engine.shape.ranks;
        let committed =
            self.engine.commit_rank(rank, &first.cache, ticket, None).expect_err("nobody has this ticket").0;
        assert!([KVHOOK_ERR_UNKNOWN_TICKET, KVHOOK_ERR_DROPPED, KVHOOK_ERR_NOT_READY].contains(&committed));
        assert!(self.engine.table_edit(ticket).is_err());
        before.assert_unchanged(&first.cache, "a ticket that is not known");
    }

    /// Ends everything, and counts what was left behind.
    fn end(mut self) {
        for place in 0..self.sequences.len() {
            let Sequence { cache, live, .. } = &self.sequences[place];
            cache.verify_bytes();
            if *live {
                self.engine.verify(cache);
                self.engine.free(cache.uid, KVH_FREE_FINISHED).expect("a live sequence");
                self.ended(place);
            }
        }
        for (name, _) in ARMS.iter().zip(self.arms).filter(|(_, script)| script.is_some()) {
            assert_eq!(self.engine.figures(name).0.live, 0, "arm {name}");
        }
        // Asserts that all memory was given back.
        drop(self.engine);
        for (script, _) in SCRIPTS.iter() {
            assert_eq!(script.live.load(Ordering::SeqCst), 0, "instances that were not destroyed");
            let mut told = HashSet::new();
            for &(rank, uid, _) in lock(&script.freed).iter() {
                assert!(told.insert((rank, uid)), "rank {rank} was told twice that sequence {uid} ended");
            }
        }
    }
}

fuzz_target!(|input: Input| {
    let mut world = World::new(&input);
    world.arm_set(0, 1, 0);
    for call in &input.calls {
        world.make(call);
    }
    world.end();
});
