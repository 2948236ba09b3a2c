//! Assertions about plans.

/// Asserts that `kept` (ascending) are the best of `scores` beside the first `sinks` and the last `recent` rows, which
/// have to be among them. Scores that differ by `tolerance` times the largest one count as equal: a plugin computes in
/// f32, in another order.
///
/// # Panics
/// Where a protected row is missing, or a row was kept though a better one was dropped.
#[track_caller]
pub fn assert_top(scores: &[f64], kept: &[u32], sinks: usize, recent: usize, tolerance: f64) {
    let length = scores.len();
    let protected = |row: usize| row < sinks || row + recent >= length;
    let is_kept = |row: usize| kept.binary_search(&(row as u32)).is_ok();
    if let Some(row) = (0..length).find(|row| protected(*row) && !is_kept(*row)) {
        panic!("row {row} of {length} is protected ({sinks} sinks, {recent} recent rows) and was dropped");
    }
    let open = || (0..length).filter(|row| !protected(*row));
    let worst_kept = open().filter(|row| is_kept(*row)).map(|row| scores[row]).fold(f64::INFINITY, f64::min);
    let best_dropped = open().filter(|row| !is_kept(*row)).map(|row| scores[row]).fold(f64::NEG_INFINITY, f64::max);
    let scale = open().map(|row| scores[row].abs()).filter(|score| score.is_finite()).fold(0.0, f64::max);
    assert!(
        worst_kept >= best_dropped - tolerance * scale,
        "a row with score {worst_kept} was kept though one with {best_dropped} was dropped"
    );
}
