//! Round trips of any weights, and readers on any damage.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use kvhook_mlp_weights::{ImageOrder, Pairing, Stored, read, v1, v2};
use proptest::prelude::*;

/// A version 1 file of any shape, element type and biases. Numbers are any bits: NaN, too.
fn file() -> impl Strategy<Value = Vec<u8>> {
    let shape = (1usize..4, 1usize..5, 2usize..5, 0u16..3, any::<bool>(), any::<[u32; 3]>());
    let metadata = proptest::collection::vec(any::<u8>(), 0..20);
    (shape, metadata, any::<u64>()).prop_map(|((layers, half, factor, dtype, images, odd), metadata, seed)| {
        let mut state = seed;
        let mut byte = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        let (dim, size, count) = (2 * half, if dtype == 2 { 4 } else { 2 }, if images { 12 } else { 6 });
        let mut bytes = b"MCVK\x01\0\0\0".to_vec();
        bytes.extend(dtype.to_le_bytes());
        bytes.extend([0, 0]);
        let [heads, hidden, min_seq_len] = odd;
        let words =
            [layers as u32, heads, dim as u32, hidden, factor as u32, min_seq_len, count as u32, metadata.len() as u32];
        bytes.extend(words.map(u32::to_le_bytes).concat());
        bytes.extend(metadata);
        for matrix in 0..layers * count {
            let cols = if matrix % 3 == 0 { factor * dim } else { dim };
            let has_bias = byte() % 2;
            bytes.extend([dim as u32, cols as u32, u32::from(has_bias)].map(u32::to_le_bytes).concat());
            bytes.extend((0..(dim * cols + dim * usize::from(has_bias)) * size).map(|_| byte()));
        }
        bytes
    })
}

fn order() -> impl Strategy<Value = Option<ImageOrder>> {
    prop_oneof![Just(None), Just(Some(ImageOrder::KeyFirst)), Just(Some(ImageOrder::ValueFirst))]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn version_1_comes_back_byte_for_byte(first in file(), order in order()) {
        let stored = v1::read(&first, order).unwrap();
        let second = v2::write(&stored).unwrap();
        let again = v2::read(&second).unwrap();
        prop_assert_eq!(&again.layers, &stored.layers);
        prop_assert_eq!(v1::write(&again, None).unwrap(), first);
    }

    #[test]
    fn a_header_of_our_own_keeps_the_tensors(first in file(), order in order()) {
        let stored = Stored { origin: None, ..v1::read(&first, None).unwrap() };
        let written = v1::write(&stored, order).unwrap();
        let again = v1::read(&written, None).unwrap();
        prop_assert_eq!(&again.layers, &stored.layers);
        prop_assert_eq!(&again.terms, &stored.terms);
    }

    #[test]
    fn pairing_there_and_back_is_nothing(first in file()) {
        let weights = read(&first, None).unwrap().decode(false).unwrap();
        let bits = |weights: &kvhook_mlp_weights::Weights| -> Vec<u32> {
            weights.layers.iter().flat_map(|l| [&l.text_k.w1, &l.text_k.w3, &l.text_k.b3])
                .flat_map(|values| values.iter().map(|value| value.to_bits())).collect()
        };
        let mut turned = weights.clone();
        turned.to_pairing(Pairing::Interleaved);
        let (mut a, mut b) = (bits(&turned), bits(&weights));
        a.sort();
        b.sort();
        prop_assert_eq!(a, b, "a permutation");
        turned.to_pairing(Pairing::HalfSplit);
        prop_assert_eq!(bits(&turned), bits(&weights));
    }

    #[test]
    fn damage_is_an_error_or_another_file_but_never_a_panic(
        first in file(), second in any::<bool>(), places in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..4)
    ) {
        let mut bytes = if second { v2::write(&v1::read(&first, None).unwrap()).unwrap() } else { first };
        for (place, value) in places {
            let length = bytes.len();
            bytes[place % length.min(400)] = value;
        }
        if let Ok(stored) = read(&bytes, None) {
            // Whatever is accepted is accepted again when written.
            let written = v2::write(&stored).unwrap();
            prop_assert_eq!(&v2::read(&written).unwrap().layers, &stored.layers);
        }
    }
}
