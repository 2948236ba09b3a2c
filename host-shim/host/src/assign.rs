//! Which arm a key falls to: weighted rendezvous hashing.
//!
//! Each arm draws u in (0, 1) from its name and the key; the least -ln(u) / weight wins. -ln(u) / weight is exponentially
//! distributed with the weight as its rate, so an arm wins with probability weight / sum of weights (P. S. Efraimidis and
//! P. G. Spirakis, Weighted random sampling with a reservoir, 2006). An arm's number depends on no other arm: a change of
//! one arm's weight moves keys to or from that arm only.

use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::arm::Arm;

/// The arm of a key, of those that take sequences and have weight.
pub fn choose<'a>(arms: &'a [Arc<Arm>], key: &[u8]) -> Option<&'a Arc<Arm>> {
    let scored = arms.iter().filter(|arm| arm.takes_sequences()).filter_map(|arm| {
        let weight = arm.weight();
        (weight > 0.0).then(|| (-unit(&arm.name, key).ln() / weight, arm))
    });
    // Two arms have the same number only where weights are too small to divide by: then the names decide.
    let least = scored.min_by(|(a, of_a), (b, of_b)| a.total_cmp(b).then_with(|| of_a.name.cmp(&of_b.name)));
    least.map(|(_, arm)| arm)
}

/// A number in (0, 1): the first 52 bits, big-endian, of the SHA-256 of name, a zero byte and key, and a half, over 2^52,
/// so that no number rounds to 0 or 1. A name holds no zero byte, so no two pairs hash the same text.
fn unit(name: &str, key: &[u8]) -> f64 {
    let digest: [u8; 32] = Sha256::new().chain_update(name).chain_update([0]).chain_update(key).finalize().into();
    let head = digest.iter().take(8).fold(0u64, |head, &byte| head << 8 | u64::from(byte));
    ((head >> 12) as f64 + 0.5) / (1u64 << 52) as f64
}
