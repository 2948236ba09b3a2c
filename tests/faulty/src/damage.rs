//! Damages a good plan after the safe side has made it, since the safe side makes no bad ones.

use std::cell::Cell;

use kvhook_abi::raw::*;

use crate::config::Damage;

thread_local! {
    /// What the hook that runs on this thread wants to have damaged, and in which layer.
    static ORDERED: Cell<Option<(Damage, Option<u32>)>> = const { Cell::new(None) };
}

/// Orders damage for the plans of the call that runs on this thread.
pub(crate) fn order(damage: Damage, layer: Option<u32>) {
    ORDERED.set(Some((damage, layer)));
}

/// Damages the plans of a call as its hook ordered.
///
/// # Safety
/// `out` is what the host lent for a call of this plugin that has succeeded.
pub(crate) unsafe fn carry_out(out: *mut KvhPrepareOut) {
    let Some((damage, only)) = ORDERED.take() else { return };
    if matches!(damage, Damage::None | Damage::NotLent) {
        return;
    }
    // SAFETY: the host's, by the caller's promise; the same holds for what it points to.
    let plans = unsafe { (*out).plans };
    for index in 0..plans.count {
        // SAFETY: as above.
        let plan = unsafe { &mut *element::<KvhPlan>(plans, index) };
        match damage {
            Damage::UnknownKind => plan.kind = 77,
            Damage::StructSize => plan.struct_size = 8,
            Damage::Moved => {
                plan.flags |= KVH_PLAN_FLAG_MOVED_POSITIONS;
                plan.next_position = 1;
            }
            _ => {
                for layer in (0..plan.layers.count).filter(|layer| only.is_none_or(|only| u64::from(only) == *layer)) {
                    let element = element::<KvhLayerPlan>;
                    // SAFETY: as above; with `write-tail` the host's elements are larger.
                    unsafe {
                        damage_layer(damage, &mut *element(plan.layers, layer));
                        if damage == Damage::WriteTail {
                            element(plan.layers, layer).add(1).cast::<u8>().write(1);
                        }
                    }
                }
            }
        }
    }
}

/// # Safety
/// The array is valid and has the element.
unsafe fn element<T>(array: KvhArrayMut, index: u64) -> *mut T {
    // SAFETY: passed on from the caller.
    unsafe { array.data.cast::<u8>().add((index * array.stride) as usize) }.cast()
}

/// # Safety
/// The plan is one that the safe side has filled: its arrays are ticket memory with `count` elements or more.
unsafe fn damage_layer(damage: Damage, plan: &mut KvhLayerPlan) {
    let count = plan.count as usize;
    // SAFETY: passed on from the caller.
    let (indices, positions, ranges) = unsafe {
        (slice(plan.indices, count), slice(plan.positions, count), slice(plan.ranges, plan.range_count as usize))
    };
    match damage {
        Damage::OutOfRange => {
            indices.last_mut().into_iter().for_each(|last| *last += 1 << 20);
            ranges.last_mut().into_iter().for_each(|last| last.start += 1 << 20);
        }
        Damage::Negative => {
            indices.last_mut().into_iter().for_each(|last| *last = u32::MAX);
            ranges.last_mut().into_iter().for_each(|last| last.start = u64::MAX);
        }
        Damage::Descending => {
            exchange_last(indices);
            exchange_last(positions);
            exchange_last(ranges);
        }
        Damage::Repeated => {
            repeat_last(indices);
            repeat_last(positions);
            repeat_last(ranges);
        }
        Damage::TooMany => plan.count += 1,
        Damage::NoRows => plan.count = 0,
        Damage::Fewer => plan.count -= 1,
        Damage::NullArray => {
            plan.indices = std::ptr::null();
            plan.positions = std::ptr::null();
            plan.ranges = std::ptr::null();
        }
        Damage::Both => {
            static RANGE: KvhRange = KvhRange { start: 0, length: 1 };
            static INDEX: u32 = 0;
            if plan.indices.is_null() {
                plan.indices = &INDEX;
            } else {
                plan.ranges = &RANGE;
                plan.range_count = 1;
            }
        }
        Damage::Sum => ranges.last_mut().into_iter().for_each(|last| last.length -= 1),
        // SAFETY: none; to write behind the indices is the damage.
        Damage::WriteMemory => unsafe { plan.indices.cast_mut().add(count).write(0) },
        Damage::Position => positions.last_mut().into_iter().for_each(|last| *last += 1 << 20),
        Damage::None | Damage::UnknownKind | Damage::NotLent | Damage::Moved => {}
        Damage::WriteCache | Damage::WriteTail | Damage::StructSize => {}
    }
}

/// # Safety
/// `data` is null or writable for `count` elements that nobody else uses now.
unsafe fn slice<'a, T>(data: *const T, count: usize) -> &'a mut [T] {
    if data.is_null() {
        return &mut [];
    }
    // SAFETY: passed on from the caller.
    unsafe { std::slice::from_raw_parts_mut(data.cast_mut(), count) }
}

fn exchange_last<T>(values: &mut [T]) {
    if let [.., a, b] = values {
        std::mem::swap(a, b);
    }
}

fn repeat_last<T: Copy>(values: &mut [T]) {
    if let [.., a, b] = values {
        *a = *b;
    }
}
