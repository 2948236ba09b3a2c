//! Index checks, compared with a rule stated over pairs.

use kvhook_kernels::check::check_indices;
use kvhook_kernels::{BadIndex, IndexFault, Indices};
use proptest::prelude::*;

proptest! {
    #[test]
    fn first_fault_is_named(mut data in prop::collection::vec(0u32..40, 0..12), sorted: bool, length in 0usize..45) {
        if sorted {
            data.sort_unstable();
            data.dedup();
        }
        let wrong = (0..data.len()).find(|&place| {
            data[place] as usize >= length || (place > 0 && data[place - 1] >= data[place])
        });
        match (check_indices(&Indices::shared(&data), 3, length), wrong) {
            (Ok(()), None) => {}
            (Err(bad), Some(place)) => {
                prop_assert_eq!((bad.head, bad.place, bad.value), (0, place, data[place]));
            }
            (found, expected) => prop_assert!(false, "{found:?}, expected the place {expected:?}"),
        }
    }
}

#[test]
fn each_fault() {
    let bad = |data: &[u32]| check_indices(&Indices::per_head(data, 3), 2, 10).unwrap_err();
    let at = |place, value, fault| BadIndex { head: 1, place, value, fault };
    assert_eq!(bad(&[0, 1, 2, 7, 8, 10]), at(2, 10, IndexFault::OutOfRange { length: 10 }));
    assert_eq!(bad(&[0, 1, 2, u32::MAX, 8, 9]), at(0, u32::MAX, IndexFault::OutOfRange { length: 10 }));
    assert_eq!(bad(&[0, 1, 2, 7, 6, 9]), at(1, 6, IndexFault::Descending { previous: 7 }));
    assert_eq!(bad(&[0, 1, 2, 7, 7, 9]), at(1, 7, IndexFault::Repeated));
    assert_eq!(bad(&[0, 1, 2, 7]), at(1, 0, IndexFault::BufferTooShort { needed: 6, found: 4 }));
    assert_eq!(check_indices(&Indices::per_head(&[0, 1, 2, 7, 8, 9], 3), 2, 10), Ok(()));
    assert_eq!(check_indices(&Indices::per_head(&[], 0), 2, 0), Ok(()));
    let message = bad(&[0, 1, 2, 7, 8, 10]).to_string();
    assert_eq!(message, "indices, head 1, place 2: token 10 is out of range, expected less than 10");
}
