//! Weights are held once, however many ranks and arms use them.

use std::process::Command;

use super::engine::{Engine, Shape};
use super::weights::Weights;

const FACTOR: usize = 4;
const SHAPE: Shape = Shape { layers: 40, dim: 128, capacity: 64, ranks: 3, ..super::SHAPE };
const RANKS: usize = SHAPE.ranks;
const ARMS: usize = 2;

/// Bytes of all numbers as the plugin keeps them: f32.
const WEIGHTS: usize = SHAPE.layers * 2 * ((FACTOR + 2) * SHAPE.dim + 3) * SHAPE.dim * 4;

/// Resident bytes of this process.
fn resident() -> usize {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
}

/// The child: alone in its process, so that no other test's memory is counted. Prints what the first instance costs
/// with all that comes with it, and what the others add.
#[test]
#[ignore = "run by `ranks_and_arms_share_their_weights` in a process of its own"]
fn child() {
    let folder = tempfile::tempdir().unwrap();
    let path = Weights::random(FACTOR, SHAPE.dim, SHAPE.layers, false).write(folder.path(), "weights.bin");
    let config = format!("weights={},positions=logical", path.display());
    let before = resident();
    let first = Engine::new(Shape { ranks: 1, ..SHAPE }, &config).unwrap();
    let one = resident();
    let all = Engine::new(SHAPE, &config).unwrap();
    for arm in 1..ARMS {
        all.arm(&format!("arm{arm}"), &format!("{config},recent={arm}")).unwrap();
    }
    println!("resident {} {}", one - before, resident().saturating_sub(one));
    drop((first, all));
}

#[test]
fn ranks_and_arms_share_their_weights() {
    let program = std::env::current_exe().unwrap();
    let output = Command::new(program)
        .args(["--exact", "memory::child", "--ignored", "--nocapture", "--test-threads=1"])
        // One arena and a fixed threshold: what is freed goes back, so that resident memory is what is held.
        .envs([("MALLOC_ARENA_MAX", "1"), ("MALLOC_MMAP_THRESHOLD_", "65536"), ("MALLOC_TRIM_THRESHOLD_", "65536")])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let numbers = text.lines().find_map(|line| line.split_once("resident ")).unwrap().1;
    let numbers: Vec<usize> = numbers.split(' ').map(|number| number.parse().unwrap()).collect();
    let (first, others) = (numbers[0], numbers[1]);
    assert!(first > WEIGHTS * 9 / 10, "{first} bytes do not hold {WEIGHTS} of weights: this measures nothing");
    // Six copies more would be six times the weights; caches, instances and leftovers of reading are far below one.
    assert!(others < WEIGHTS / 2, "{} instances more cost {others} bytes; weights are {WEIGHTS}", RANKS * ARMS);
}
