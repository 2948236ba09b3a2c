//! Plans that say anything, from a plugin inside this program: a plan that breaks a rule changes no byte of the cache; a
//! good one gives what a plain reading of it says. The arrays of a plan are as large as the contract asks for, or null, and
//! are gone when the plugin has answered: the host must have copied what it needs.

#![no_main]

use std::sync::{Arc, LazyLock, Mutex};

use arbitrary::Arbitrary;
use kvhook_abi::raw::*;
use kvhook_fuzz::mock::plugin::{Script, Style, rewritten_tag};
use kvhook_fuzz::mock::{ALL, BF16, Cache, Engine, F32, SMALL, Shape};
use kvhook_fuzz::rows::Before;
use kvhook_host::raw::*;
use kvhook_host::spec::ArmSpec;
use libfuzzer_sys::fuzz_target;

const LAYERS: usize = 2;
const HEADS: usize = 2;
const BLOCK: usize = 4;
/// Rows that there is room for: more than ever come.
const CAPACITY: usize = 80;
/// Elements of every array of a plan: more than any count and stride that the host reads by.
const ROOM: usize = 512;
const EMPTY: KvhRange = KvhRange { start: 0, length: 0 };
/// Offers that an engine may lack.
const OPTIONAL: [u64; 4] = [KVH_CAN_LAYER_COUNTS, KVH_CAN_DATA_COUNTS, KVH_CAN_REWRITE, KVH_CAN_MOVE_POSITIONS];

#[derive(Arbitrary, Debug)]
struct Input {
    paged: bool,
    token_major: bool,
    half: bool,
    two_ranks: bool,
    /// Bits of `OPTIONAL`; most values lack nothing.
    lacks: u8,
    data_counts: bool,
    prompt: u8,
    /// Share of a layer's rows that is kept, over 256.
    keep: [u8; LAYERS],
    rounds: [Round; 3],
}

#[derive(Arbitrary, Debug)]
struct Round {
    style: u8,
    fresh: bool,
    shared: u8,
    late: u8,
    header: Option<HeaderEdit>,
    edits: Vec<(u8, Edit)>,
    /// 0: both ranks' plans are edited.
    edited_rank: u8,
}

/// A change of a plan that was good, outside its layers.
#[derive(Arbitrary, Clone, Debug)]
enum HeaderEdit {
    Kind(u8),
    Reason(i32),
    Flags(u8),
    Next(i8),
    HugeNext(u64),
    /// The host's own fields are overwritten.
    Clobber,
}

/// A change of one layer. Small changes are relative: most of what they make is nearly good.
#[derive(Arbitrary, Clone, Debug)]
enum Edit {
    Count(i8),
    HugeCount(u32),
    RangeCount(i8),
    HugeRangeCount(u32),
    MoveRange(u8, i8),
    GrowRange(u8, i8),
    HugeRange(u8, u64, u64),
    Ranges(Vec<(u8, u8)>),
    NoRanges,
    Index(u8, i8),
    HugeIndex(u8, u32),
    Indices(Vec<u8>),
    NoIndices,
    IndexStride(i8),
    ExtremeIndexStride(bool),
    Position(u8, i8),
    HugePosition(u8, u32),
    Positions(Vec<u8>),
    NoPositions,
    PositionStride(i8),
    ExtremePositionStride(bool),
}

/// One layer of a plan, with arrays of its own.
#[derive(Clone, Default)]
struct Layer {
    count: u32,
    range_count: u32,
    indices: Option<Vec<u32>>,
    index_stride: i64,
    ranges: Option<Vec<KvhRange>>,
    positions: Option<Vec<u32>>,
    position_stride: i64,
}

/// A plan as it went out.
#[derive(Clone, Default)]
struct Sent {
    kind: i32,
    flags: u32,
    next_position: u64,
    layers: Vec<Layer>,
}

/// What the plugin is to do, and what it did, by rank.
#[derive(Default)]
struct Scene {
    keep: [u8; LAYERS],
    header: Option<HeaderEdit>,
    edits: Vec<(u8, Edit)>,
    edited_rank: u8,
    sent: Option<Sent>,
}

static SCENE: LazyLock<Mutex<Scene>> = LazyLock::new(Mutex::default);
/// Without and with counts that depend on data, and their configs.
static SCRIPTS: LazyLock<[(Arc<Script>, String); 2]> = LazyLock::new(|| {
    [0, KVH_CAN_DATA_COUNTS].map(|must| {
        let tamper: kvhook_fuzz::mock::plugin::Tamper = Box::new(tamper);
        let count = |layer: usize, length: u64| bound(scene().keep[layer], length);
        let script = Script { must, count: Box::new(count), tamper: Some(tamper).into(), ..Script::default() };
        let script = Arc::new(script);
        let config = script.register();
        (script, config)
    })
});

fn scene() -> std::sync::MutexGuard<'static, Scene> {
    SCENE.lock().expect("no panic is survived")
}

fn bound(keep: u8, length: u64) -> u64 {
    (length * u64::from(keep) / 256).max(1).min(length)
}

/// Copies `data` into an array with room.
fn own<T: Copy>(data: &[T], fill: T) -> Vec<T> {
    let mut array = vec![fill; ROOM];
    for (to, from) in array.iter_mut().zip(data) {
        *to = *from;
    }
    array
}

/// # Safety
/// `data` is null or points to `count` elements.
unsafe fn copied<T: Copy>(data: *const T, count: usize, fill: T) -> Option<Vec<T>> {
    // SAFETY: passed on from the caller.
    (!data.is_null()).then(|| own(unsafe { core::slice::from_raw_parts(data, count) }, fill))
}

fn tamper(rank: u32, plan: &mut KvhPlan, layers: &mut [KvhLayerPlan]) {
    let mut scene = scene();
    let lists = |stride: i64, count: u32| count as usize * if stride == 0 { 1 } else { HEADS };
    let mut sent = Sent { kind: plan.kind, flags: plan.flags, next_position: plan.next_position, layers: Vec::new() };
    for raw in layers.iter() {
        // SAFETY: the scripted plugin filled the plan.
        sent.layers.push(unsafe {
            Layer {
                count: raw.count,
                range_count: raw.range_count,
                indices: copied(raw.indices, lists(raw.index_stride_head, raw.count), 0),
                index_stride: raw.index_stride_head,
                ranges: copied(raw.ranges, raw.range_count as usize, EMPTY),
                positions: copied(raw.positions, lists(raw.position_stride_head, raw.count), 0),
                position_stride: raw.position_stride_head,
            }
        });
    }
    let edited = scene.edited_rank == 0 || u32::from(scene.edited_rank) == rank + 1;
    if let Some(header) = scene.header.as_ref().filter(|_| edited) {
        match header {
            HeaderEdit::Kind(kind) => sent.kind = i32::from(kind % 5) - 1,
            HeaderEdit::Reason(reason) => plan.reason = *reason,
            HeaderEdit::Flags(flags) => sent.flags = u32::from(flags % 4),
            HeaderEdit::Next(by) => sent.next_position = sent.next_position.wrapping_add_signed(small(*by)),
            HeaderEdit::HugeNext(next) => sent.next_position = *next,
            HeaderEdit::Clobber => {
                plan.struct_size = 0;
                plan.message = core::ptr::null_mut();
                plan.layers = KvhArrayMut { data: core::ptr::null_mut(), count: u64::MAX, stride: 1 };
            }
        }
    }
    for (layer, edit) in scene.edits.iter().filter(|_| edited) {
        sent.layers[usize::from(*layer) % LAYERS].edit(edit);
    }
    (plan.kind, plan.flags, plan.next_position) = (sent.kind, sent.flags, sent.next_position);
    for (raw, layer) in layers.iter_mut().zip(&sent.layers) {
        (raw.count, raw.range_count) = (layer.count, layer.range_count);
        raw.indices = layer.indices.as_ref().map_or(core::ptr::null(), |array| array.as_ptr());
        raw.index_stride_head = layer.index_stride;
        raw.ranges = layer.ranges.as_ref().map_or(core::ptr::null(), |array| array.as_ptr());
        raw.positions = layer.positions.as_ref().map_or(core::ptr::null(), |array| array.as_ptr());
        raw.position_stride_head = layer.position_stride;
    }
    scene.sent = Some(sent);
}

/// From -7 to 7.
fn small(by: i8) -> i64 {
    (by % 8).into()
}

fn shift(value: &mut u32, by: i8) {
    *value = value.wrapping_add_signed(small(by) as i32);
}

/// The element at `place`, counted around the first `count`.
fn at<T>(array: &mut Option<Vec<T>>, place: u8, count: u32) -> Option<&mut T> {
    array.as_mut()?.get_mut(usize::from(place) % (count as usize).clamp(1, 255))
}

impl Layer {
    fn edit(&mut self, edit: &Edit) {
        let array = |values: &[u8]| Some(own(&values.iter().map(|&value| value.into()).collect::<Vec<u32>>(), 0));
        let extreme = |low: bool| if low { i64::MIN } else { i64::MAX };
        let (count, range_count) = (self.count, self.range_count);
        match *edit {
            Edit::Count(by) => shift(&mut self.count, by),
            Edit::HugeCount(count) => self.count = count,
            Edit::RangeCount(by) => shift(&mut self.range_count, by),
            Edit::HugeRangeCount(count) => self.range_count = count,
            Edit::MoveRange(place, by) => {
                let range = at(&mut self.ranges, place, range_count);
                range.into_iter().for_each(|range| range.start = range.start.wrapping_add_signed(small(by)));
            }
            Edit::GrowRange(place, by) => {
                let range = at(&mut self.ranges, place, range_count);
                range.into_iter().for_each(|range| range.length = range.length.wrapping_add_signed(small(by)));
            }
            Edit::HugeRange(place, start, length) => {
                let range = at(&mut self.ranges, place, range_count);
                range.into_iter().for_each(|range| *range = KvhRange { start, length });
            }
            Edit::Ranges(ref ranges) => {
                let range = |&(start, length): &(u8, u8)| KvhRange { start: start.into(), length: length.into() };
                self.ranges = Some(own(&ranges.iter().map(range).collect::<Vec<_>>(), EMPTY));
                self.range_count = ranges.len() as u32;
            }
            Edit::NoRanges => self.ranges = None,
            Edit::Index(place, by) => at(&mut self.indices, place, count).into_iter().for_each(|row| shift(row, by)),
            Edit::HugeIndex(place, row) => at(&mut self.indices, place, count).into_iter().for_each(|to| *to = row),
            Edit::Indices(ref rows) => self.indices = array(rows),
            Edit::NoIndices => self.indices = None,
            Edit::IndexStride(stride) => self.index_stride = stride.into(),
            Edit::ExtremeIndexStride(low) => self.index_stride = extreme(low),
            Edit::Position(place, by) => {
                at(&mut self.positions, place, count).into_iter().for_each(|position| shift(position, by));
            }
            Edit::HugePosition(place, position) => {
                at(&mut self.positions, place, count).into_iter().for_each(|to| *to = position);
            }
            Edit::Positions(ref positions) => self.positions = array(positions),
            Edit::NoPositions => self.positions = None,
            Edit::PositionStride(stride) => self.position_stride = stride.into(),
            Edit::ExtremePositionStride(low) => self.position_stride = extreme(low),
        }
    }

    /// The rows that a select keeps, for each head; none where it breaks a rule.
    fn selected(&self, length: u64) -> Option<Vec<Vec<u64>>> {
        let rows: Vec<Vec<u64>> = match (&self.ranges, &self.indices) {
            (Some(ranges), None) => {
                let ranges = ranges.get(..self.range_count as usize)?;
                let mut rows = Vec::new();
                for range in ranges {
                    if range.length == 0 || range.length > length || range.start > length {
                        return None;
                    }
                    rows.extend(range.start..range.start + range.length);
                }
                vec![rows; HEADS]
            }
            (None, Some(indices)) => {
                (0..HEADS).map(|head| numbers(indices, self.index_stride, head, self.count)).collect::<Option<_>>()?
            }
            _ => return None,
        };
        let good = |rows: &Vec<u64>| {
            rows.len() as u64 == u64::from(self.count)
                && rows.iter().all(|&row| row < length)
                && rows.windows(2).all(|pair| pair[0] < pair[1])
        };
        rows.iter().all(good).then_some(rows)
    }
}

/// The `count` numbers of one head.
fn numbers(array: &[u32], stride: i64, head: usize, count: u32) -> Option<Vec<u64>> {
    let start = usize::try_from(stride).ok()?.checked_mul(head)?;
    let numbers = array.get(start..)?.get(..count as usize)?;
    Some(numbers.iter().map(|&number| number.into()).collect())
}

/// (position, tag) of each row, by layer and head.
type Rows = Vec<Vec<Vec<(u64, u64)>>>;

/// What a plan makes of the rows of one rank, and the next position if it sets one; none where it breaks a rule or keeps
/// everything.
fn judge(
    sent: &Sent,
    lent: bool,
    cache: &Cache,
    rank: usize,
    keep: [u8; LAYERS],
    can: u64,
    must: u64,
) -> Option<(Rows, Option<u64>)> {
    let rewrite = match sent.kind {
        KVH_PLAN_SELECT => false,
        KVH_PLAN_REWRITE => true,
        _ => return None,
    };
    let moved = match sent.flags {
        0 => None,
        KVH_PLAN_FLAG_MOVED_POSITIONS if rewrite && can & KVH_CAN_MOVE_POSITIONS != 0 => Some(sent.next_position),
        _ => return None,
    };
    if moved.is_some_and(|next| next > cache.next_position) {
        return None;
    }
    let mut after = Rows::new();
    for (layer, plan) in sent.layers.iter().enumerate() {
        let old = &cache.rows[rank][layer];
        let length = old[0].len() as u64;
        let (count, bound) = (u64::from(plan.count), bound(keep[layer], length));
        if !rewrite && count == 0 && plan.ranges.is_none() && plan.indices.is_none() && bound == length {
            after.push(old.clone());
            continue;
        }
        if count == 0 || count > bound || (count < bound && can & must & KVH_CAN_DATA_COUNTS == 0) {
            return None;
        }
        let of_head = |head: usize| {
            if !rewrite {
                let rows = plan.selected(length)?;
                return Some(rows[head].iter().map(|&row| old[head][row as usize]).collect::<Vec<_>>());
            }
            let positions = numbers(plan.positions.as_ref()?, plan.position_stride, head, plan.count)?;
            let limit = moved.unwrap_or(cache.next_position);
            let good = positions.windows(2).all(|pair| pair[0] <= pair[1]) && positions.iter().all(|&at| at < limit);
            let tag = |place| rewritten_tag(cache.uid, rank as u64, layer as u64, head as u64, place);
            (good && lent).then(|| (0..).zip(positions).map(|(place, position)| (position, tag(place))).collect())
        };
        after.push((0..HEADS).map(of_head).collect::<Option<_>>()?);
    }
    let counts: Vec<_> = after.iter().map(|heads| heads[0].len()).collect();
    let differ = counts.windows(2).any(|pair| pair[0] != pair[1]);
    let equal_before = cache.lengths(rank).windows(2).all(|pair| pair[0] == pair[1]);
    if differ && (moved.is_some() || (equal_before && can & KVH_CAN_LAYER_COUNTS == 0)) {
        return None;
    }
    (rewrite || after != cache.rows[rank]).then_some((after, moved))
}

fn style(number: u8) -> Style {
    match number % 7 {
        0 => Style::Heads,
        1 => Style::Shared,
        2 => Style::Ranges,
        3 => Style::Blocks(BLOCK as u64),
        4 => Style::Rewrite,
        5 => Style::Rerotate,
        _ => Style::Keep(number.into()),
    }
}

/// A sequence, and what is known of its engine.
struct Stage {
    engine: Engine,
    cache: Cache,
    keep: [u8; LAYERS],
    must: u64,
}

impl Stage {
    /// One compression, as far as it comes.
    fn play(&mut self, script: &Script, round: &Round) {
        let style = style(round.style);
        *script.style.lock().expect("no panic is survived") = style;
        {
            let mut scene = scene();
            scene.header = round.header.clone();
            scene.edits = round.edits.iter().take(12).cloned().collect();
            scene.edited_rank = round.edited_rank % 3;
        }
        let Self { engine, cache, .. } = &*self;
        let before = Before::of(cache);
        let shared = u64::from(round.shared.saturating_sub(192)) % 24;
        let asked = engine.ask_shared(cache, KVHOOK_EVENT_PREFILL_DONE, shared, 0).expect("a live sequence");
        before.assert_unchanged(cache, "ask");
        if asked.0 == KVHOOK_DECISION_KEEP {
            return;
        }
        let bounds = (0..LAYERS).map(|layer| bound(self.keep[layer], cache.lengths(0)[layer]));
        assert_eq!(asked.2, bounds.collect::<Vec<_>>());

        let lent = matches!(style, Style::Rewrite | Style::Rerotate);
        let mut judged = Vec::new();
        let mut answers = Vec::new();
        for rank in 0..engine.shape.ranks {
            let answer = engine.prepare_all(rank, &[cache], KVHOOK_EVENT_PREFILL_DONE, round.fresh, shared);
            let answer = answer.expect("a good call")[0];
            before.assert_unchanged(cache, "prepare");
            // What the plan's arrays held is gone from here on.
            let sent = scene().sent.take();
            let good = sent.and_then(|sent| judge(&sent, lent, cache, rank, self.keep, engine.shape.can, self.must));
            assert!(good.is_some() || answer.0 == 0, "rank {rank}: a plan that breaks a rule got a ticket");
            judged.push(good);
            answers.push(answer);
        }
        let Some(judged) = judged.into_iter().collect::<Option<Vec<_>>>() else { return self.is_kept(&answers) };
        if judged.iter().any(|(_, moved)| *moved != judged[0].1) {
            return self.is_kept(&answers);
        }
        if let Some((_, reason)) = answers.iter().find(|answer| answer.0 == 0) {
            assert!(*reason == KVH_REASON_NO_ROOM && shared > 0 && !round.fresh, "a good plan was refused: {reason}");
            return self.is_kept(&answers);
        }
        assert!(answers.iter().all(|answer| *answer == answers[0]), "ranks have different tickets");
        let late = round.late % 5;
        self.cache.append(late.into());
        self.commit(answers[0].0, judged, usize::from(late), shared);
    }

    /// No ticket of a sequence that is kept may be committed.
    fn is_kept(&self, answers: &[(u64, i32)]) {
        let before = Before::of(&self.cache);
        for &(ticket, _) in answers.iter().filter(|answer| answer.0 != 0) {
            assert_eq!(self.engine.verdict(ticket).expect("it was given").0, KVHOOK_VERDICT_DROPPED);
            let committed = self.engine.commit_rank(0, &self.cache, ticket, None);
            assert_eq!(committed.expect_err("it is dropped").0, KVHOOK_ERR_DROPPED);
        }
        before.assert_unchanged(&self.cache, "a dropped ticket");
    }

    /// Carries out a good ticket behind which `late` rows were appended, and compares with what was judged.
    fn commit(&mut self, ticket: u64, judged: Vec<(Rows, Option<u64>)>, late: usize, shared: u64) {
        let Self { engine, cache, .. } = self;
        let (verdict, _, movement, _) = engine.verdict(ticket).expect("an open ticket");
        assert_eq!(verdict, KVHOOK_VERDICT_READY);
        let edits = (movement == KVHOOK_MOVE_TABLE).then(|| engine.table_edit(ticket).expect("an edit of the table"));
        let mut fresh = (movement == KVHOOK_MOVE_FRESH).then(|| Cache::new(engine.shape, cache.uid, cache.capacity));
        let unused = fresh.as_ref().map(Before::of);
        let before = Before::of(cache);
        let moved = judged[0].1;
        for (rank, (rows, _)) in judged.into_iter().enumerate() {
            let committed = engine.commit_rank(rank, cache, ticket, fresh.as_ref());
            if moved.is_some() && late > 0 {
                // The late rows have the old rotation.
                assert_eq!(committed.expect_err("rotations would be mixed").0, KVHOOK_ERR_INVALID_ARGUMENT);
                return before.assert_unchanged(cache, "a commit that failed");
            }
            let (lengths, next_position) = committed.expect("a good ticket");
            match movement {
                KVHOOK_MOVE_IN_PLACE => before.assert_only_own_rows_changed(cache, rank, shared),
                _ => before.assert_unchanged(cache, "a commit that writes elsewhere"),
            }
            for (now, kept) in cache.rows[rank].iter_mut().flatten().zip(rows.into_iter().flatten()) {
                let appended = now.split_off(now.len() - late);
                *now = kept.into_iter().chain(appended).collect();
            }
            assert_eq!(lengths, cache.lengths(rank));
            assert_eq!(next_position, moved.unwrap_or(cache.next_position));
        }
        cache.epoch += 1;
        cache.next_position = moved.unwrap_or(cache.next_position);
        if let (Some(fresh), Some(unused)) = (&mut fresh, unused) {
            core::mem::swap(&mut cache.stores, &mut fresh.stores);
            unused.assert_unused_behind(cache);
        }
        if let Some(edits) = edits {
            for (rank, stores) in cache.stores.iter_mut().enumerate() {
                for (layer, (store, kept)) in stores.iter_mut().zip(&edits).enumerate() {
                    let planned = before.length(rank, layer) - late;
                    let later = store.table.split_off(planned.div_ceil(BLOCK));
                    store.table = kept.iter().map(|&block| store.table[block as usize]).chain(later).collect();
                }
            }
        }
    }
}

fuzz_target!(|input: Input| {
    let lacks = |bit: usize| input.lacks < 1 << OPTIONAL.len() && input.lacks >> bit & 1 == 1;
    let lacking = OPTIONAL.iter().enumerate().filter(|(bit, _)| lacks(*bit)).fold(0, |bits, (_, bit)| bits | bit);
    let can = ALL & !lacking;
    let shape = Shape {
        ranks: 1 + usize::from(input.two_ranks),
        layers: LAYERS,
        heads: HEADS,
        dtype: if input.half { BF16 } else { F32 },
        block_size: if input.paged { BLOCK } else { 0 },
        token_major: input.token_major,
        can,
        ..SMALL
    };
    let data_counts = input.data_counts && can & KVH_CAN_DATA_COUNTS != 0;
    let (script, config) = &SCRIPTS[usize::from(data_counts)];
    let keep = if can & KVH_CAN_LAYER_COUNTS == 0 { [input.keep[0]; LAYERS] } else { input.keep };
    scene().keep = keep;
    let engine = Engine::new(shape);
    engine.arm(&ArmSpec::new("arm", "scripted", config));
    let prompt = 1 + u64::from(input.prompt % 24);
    let mut cache = Cache::new(shape, engine.begin_on("arm", "", prompt).expect("the arm is there").uid, CAPACITY);
    cache.append(prompt);
    let mut stage = Stage { engine, cache, keep, must: script.must };
    for round in &input.rounds {
        stage.play(script, round);
        stage.cache.append(3);
        stage.engine.verify(&stage.cache);
    }
    stage.engine.free(stage.cache.uid, KVH_FREE_FINISHED).expect("a live sequence");
});
