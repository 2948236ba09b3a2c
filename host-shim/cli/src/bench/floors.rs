//! The least time that an operation can take: its bytes over the bandwidth of a copy, its arithmetic over the rates of
//! the units that do it.

use super::rows::{Operation, Row};
use super::shapes::Shape;

/// Additions and multiplications a second of a large bf16 matrix product on an H100, for a run that has not measured it.
pub const H100_PRODUCTS: f64 = 776e12;

/// What the machine reached in this run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Bytes a second, read and written, of a large copy.
    pub copy: f64,
    /// Additions and multiplications a second of a large bf16 matrix product; none: its time is not part of a floor.
    pub products: Option<f64>,
    /// Exponentials a second; none: their time is not part of a floor.
    pub exponentials: Option<f64>,
}

/// Two floors of one call, for all layers and sequences, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Floors {
    /// Each byte of the input read once, each of the output written once.
    pub once: f64,
    /// The sum over phases that must follow each other of the longest of: its bytes, its products, its exponentials.
    pub phases: f64,
}

/// Bytes, products and exponentials of one phase.
#[derive(Default, Clone, Copy)]
struct Phase {
    bytes: f64,
    products: f64,
    exponentials: f64,
}

impl Phase {
    fn of_bytes(bytes: f64) -> Self {
        Self { bytes, ..Self::default() }
    }

    fn time(self, rates: &Rates) -> f64 {
        let over = |work: f64, rate: Option<f64>| rate.map_or(0.0, |rate| work / rate);
        (self.bytes / rates.copy)
            .max(over(self.products, rates.products))
            .max(over(self.exponentials, rates.exponentials))
    }
}

/// The floors of a row. Scores, indices and block tables are left out: 4 bytes where a row of K has 128 or 256.
pub fn floors(row: &Row, rates: &Rates) -> Floors {
    let mut sum = Floors::default();
    for tokens in row.batch.lengths() {
        let (once, phases) = of_layer(row, tokens);
        sum.once += once / rates.copy;
        sum.phases += phases.into_iter().map(|phase| phase.time(rates)).sum::<f64>();
    }
    let layers = row.shape.layers as f64;
    Floors { once: sum.once * layers, phases: sum.phases * layers }
}

/// Bytes read and written once, and the phases, of one layer of one sequence.
fn of_layer(row: &Row, tokens: usize) -> (f64, Vec<Phase>) {
    let Shape { kv_heads, q_heads, head_dim, .. } = *row.shape;
    let keys = row.shape.tensor_bytes(tokens) as f64;
    let kept = row.shape.tensor_bytes(row.kept(tokens)) as f64;
    // Kept rows of K and V are read and written.
    let commit = Phase::of_bytes(4.0 * kept);
    // All of K is read once for its scores; of V, what is kept.
    let scored = keys + 3.0 * kept;
    let read_keys = Phase::of_bytes(keys);
    match row.operation {
        Operation::Commit | Operation::TopK | Operation::Random | Operation::Streaming => (commit.bytes, vec![commit]),
        Operation::StreamingBlocks => (0.0, Vec::new()),
        Operation::KeyNorm => (scored, vec![read_keys, commit]),
        Operation::KeyDiff => (scored, vec![read_keys, read_keys, commit]),
        Operation::Attention(window) => {
            // Each query head of a KV head looks at each of its keys. A softmax takes two passes: first its sum, then the
            // sums of its columns. Where the weights are no more bytes than K itself, they can be kept instead.
            let weights = (window * q_heads * tokens) as f64;
            let pass = Phase { bytes: keys, products: 2.0 * weights * head_dim as f64, exponentials: weights };
            let passes = if window * q_heads / kv_heads <= 8 { 1 } else { 2 };
            let mut phases = vec![pass; passes];
            phases.push(commit);
            (scored, phases)
        }
        Operation::Mlp(factor) => {
            // K and V are read whole; each group becomes one row.
            let groups = tokens / factor;
            let bytes = 2.0 * (keys + row.shape.tensor_bytes(groups) as f64);
            let products = 2.0 * (2 * groups * kv_heads * (factor + 2) * head_dim * head_dim) as f64;
            (bytes, vec![Phase { bytes, products, exponentials: 0.0 }])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::shapes::{Batch, Form, LLAMA};
    use super::*;

    /// The floors of the notes on kernels, us a layer at 131,072 tokens with 3.02 TB/s and 776 TFLOP/s; H100's 132
    /// multiprocessors at 1.755 GHz.
    #[test]
    fn floors_of_the_notes_on_kernels() {
        let rates = Rates { copy: 3.02e12, products: Some(776e12), exponentials: Some(132.0 * 16.0 * 1.755e9) };
        for (operation, once, phases) in [
            (Operation::Commit, 178.0, 178.0),
            (Operation::TopK, 178.0, 178.0),
            (Operation::KeyNorm, 222.0, 267.0),
            (Operation::KeyDiff, 222.0, 356.0),
            (Operation::Attention(64), 222.0, 356.0),
            (Operation::Attention(1), 222.0, 267.0),
            (Operation::StreamingBlocks, 0.0, 0.0),
            (Operation::Mlp(5), 213.0, 213.0),
        ] {
            let keep = if let Operation::Mlp(factor) = operation { factor } else { 2 };
            let row = Row { shape: &LLAMA, form: Form::Contiguous, batch: Batch::One(131_072), keep, operation };
            let found = floors(&row, &rates);
            let near = |seconds: f64, expected: f64| (seconds * 1e6 / 32.0 - expected).abs() < 1.0;
            assert!(near(found.once, once) && near(found.phases, phases), "{operation:?}: {found:?}");
        }
    }

    #[test]
    fn arithmetic_counts_where_it_takes_longer_than_bytes() {
        let row = Row {
            shape: &LLAMA,
            form: Form::Contiguous,
            batch: Batch::One(1000),
            keep: 2,
            operation: Operation::Attention(64),
        };
        let bytes_only = Rates { copy: 1e12, products: None, exponentials: None };
        // K of a layer: 2,048,000 bytes. Two passes, and four times half of it.
        let expected = 32.0 * 2_048_000.0 * 4.0 / 1e12;
        assert!((floors(&row, &bytes_only).phases / expected - 1.0).abs() < 1e-12);
        // 64 x 32 queries on 1,000 keys of 128 channels: 524,288,000 operations, a second each at that rate.
        let slow = Rates { products: Some(524_288_000.0), ..bytes_only };
        let expected = 32.0 * (2.0 + 2_048_000.0 * 2.0 / 1e12);
        assert!((floors(&row, &slow).phases / expected - 1.0).abs() < 1e-12);
        let slow = Rates { exponentials: Some(2_048_000.0), ..bytes_only };
        assert!((floors(&row, &slow).phases / expected - 1.0).abs() < 1e-12);
    }

    #[test]
    fn sequences_of_a_batch_add_up() {
        let rates = Rates { copy: 1e12, products: None, exponentials: None };
        let row = |batch| Row { shape: &LLAMA, form: Form::Paged(16), batch, keep: 2, operation: Operation::KeyNorm };
        let mixed = floors(&row(Batch::Mixed), &rates);
        let single: f64 =
            Batch::Mixed.lengths().into_iter().map(|tokens| floors(&row(Batch::One(tokens)), &rates).once).sum();
        assert!((mixed.once / single - 1.0).abs() < 1e-12);
    }
}
