//! What is measured: an operation on a cache of one shape, layout and length.

use super::error::BenchError;
use super::shapes::{Batch, Form, LLAMA, LLAVA, MOST_BYTES, QWEN, SMOLLM, Shape};

/// What is done to a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Rows by indices that are given, in place: the kernels alone.
    Commit,
    /// Top-k of scores that are given, then rows by the indices: the kernels alone.
    TopK,
    /// `truncate` with `importance=key_norm`.
    KeyNorm,
    /// `truncate` with `importance=key_diff`.
    KeyDiff,
    /// `truncate` with `importance=attention`, over the last so many queries.
    Attention(usize),
    /// `truncate` with `history=sample,importance=uniform`.
    Random,
    /// `truncate` with sinks and recent rows, which move.
    Streaming,
    /// The same, but whole blocks leave the table and nothing moves.
    StreamingBlocks,
    /// `mlp-decouple` with `sinks=0,recent=0`: each so many rows become one.
    Mlp(usize),
}

impl Operation {
    /// Name in the rows' names.
    pub fn name(self) -> String {
        match self {
            Self::Commit => "commit".into(),
            Self::TopK => "top_k".into(),
            Self::KeyNorm => "key_norm".into(),
            Self::KeyDiff => "key_diff".into(),
            Self::Attention(window) => format!("attention-{window}"),
            Self::Random => "random".into(),
            Self::Streaming => "streaming".into(),
            Self::StreamingBlocks => "streaming-blocks".into(),
            Self::Mlp(factor) => format!("mlp-{factor}"),
        }
    }
}

/// One line of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// The model's.
    pub shape: &'static Shape,
    /// How rows lie.
    pub form: Form,
    /// The sequences.
    pub batch: Batch,
    /// One of so many rows is kept.
    pub keep: usize,
    /// What is done.
    pub operation: Operation,
}

impl Row {
    /// Words that name it, from the shape to the operation.
    pub fn name(&self) -> String {
        let Self { shape, form, batch, keep, operation } = self;
        format!("{} {} {} 1/{keep} {}", shape.name, form.name(), batch.name(), operation.name())
    }

    /// Rows that a sequence of so many tokens keeps.
    pub fn kept(&self, tokens: usize) -> usize {
        tokens / self.keep
    }
}

use Operation::{Attention, Commit, KeyDiff, KeyNorm, Mlp, Random, Streaming, StreamingBlocks, TopK};

/// FastCache's factor.
const FACTOR: usize = 5;
const CONTIGUOUS: [Operation; 9] =
    [Commit, TopK, KeyNorm, KeyDiff, Attention(64), Attention(1), Streaming, Random, Mlp(FACTOR)];
const PAGED: [Operation; 9] =
    [Commit, TopK, KeyNorm, KeyDiff, Attention(64), Attention(1), StreamingBlocks, Random, Mlp(FACTOR)];

/// Collects rows of one shape and layout.
struct Rows {
    shape: &'static Shape,
    form: Form,
    all: Vec<Row>,
}

impl Rows {
    fn add(&mut self, batch: Batch, keep: usize, operations: &[Operation]) {
        let (shape, form) = (self.shape, self.form);
        self.all.extend(operations.iter().map(|&operation| {
            let keep = if let Mlp(factor) = operation { factor } else { keep };
            Row { shape, form, batch, keep, operation }
        }));
    }

    fn of(shape: &'static Shape, form: Form) -> Self {
        Self { shape, form, all: Vec::new() }
    }
}

/// Rows for a CUDA device: the core set, or with `full` all of them. Rows of one shape and layout stand together.
pub fn on_cuda(full: bool) -> Vec<Row> {
    if full { grid() } else { core() }
}

fn core() -> Vec<Row> {
    let most = [Commit, TopK, KeyNorm, KeyDiff, Attention(64), Attention(1), Mlp(FACTOR)];
    let one = Batch::One;
    let mut llama = Rows::of(&LLAMA, Form::Contiguous);
    llama.add(one(2048), 2, &most);
    llama.add(one(8192), 2, &most);
    llama.add(one(32_768), 2, &CONTIGUOUS);
    llama.add(one(32_768), 4, &[TopK, KeyNorm, Attention(64)]);
    llama.add(one(32_768), 8, &[TopK, KeyNorm, Attention(64)]);
    llama.add(one(131_072), 2, &most);
    let mut paged = Rows::of(&LLAMA, Form::Paged(16));
    paged.add(one(32_768), 2, &[Commit, KeyNorm, KeyDiff, Attention(64), Attention(1), StreamingBlocks, Mlp(FACTOR)]);
    paged.add(one(131_072), 2, &[KeyNorm, StreamingBlocks]);
    paged.add(Batch::Mixed, 2, &[KeyNorm, KeyDiff, Attention(64), StreamingBlocks]);
    let mut large = Rows::of(&LLAMA, Form::Paged(256));
    large.add(one(32_768), 2, &[KeyNorm, Attention(64), StreamingBlocks]);
    let mut qwen = Rows::of(&QWEN, Form::Contiguous);
    qwen.add(one(32_768), 2, &[KeyNorm, Attention(64)]);
    let mut smollm = Rows::of(&SMOLLM, Form::Contiguous);
    smollm.add(one(8192), 2, &[KeyNorm, Attention(64), Mlp(FACTOR)]);
    let mut llava = Rows::of(&LLAVA, Form::Contiguous);
    llava.add(one(4096), 2, &[Commit, KeyNorm, Attention(64), Mlp(FACTOR)]);
    [llama, paged, large, qwen, smollm, llava].into_iter().flat_map(|rows| rows.all).collect()
}

/// Everything that fits.
fn grid() -> Vec<Row> {
    let mut all = Vec::new();
    for (shape, longest) in [(&LLAMA, 131_072), (&QWEN, 131_072), (&SMOLLM, 131_072), (&LLAVA, 4096)] {
        for form in [Form::Contiguous, Form::Paged(16), Form::Paged(256)] {
            let mut rows = Rows::of(shape, form);
            let operations = if form == Form::Contiguous { &CONTIGUOUS } else { &PAGED };
            let lengths = (10..=17).map(|power| 1usize << power);
            for tokens in lengths.filter(|&tokens| tokens <= longest && shape.cache_bytes(tokens) <= MOST_BYTES) {
                for keep in [2, 4, 8] {
                    // An MLP's factor says what it keeps.
                    let fitting =
                        operations.iter().copied().filter(|operation| keep == 2 || !matches!(operation, Mlp(_)));
                    rows.add(Batch::One(tokens), keep, &fitting.collect::<Vec<_>>());
                }
            }
            if (shape == &LLAMA || shape == &SMOLLM) && form != Form::Contiguous {
                rows.add(
                    Batch::Mixed,
                    2,
                    &[KeyNorm, KeyDiff, Attention(64), Attention(1), StreamingBlocks, Mlp(FACTOR)],
                );
            }
            all.extend(rows.all);
        }
    }
    all
}

/// Rows for ordinary memory: the same operations at small lengths.
pub fn on_cpu(full: bool) -> Vec<Row> {
    let lengths: &[usize] = if full { &[256, 1024, 4096, 8192] } else { &[256, 1024] };
    let mut all = Vec::new();
    for (shape, form) in
        [(&SMOLLM, Form::Contiguous), (&SMOLLM, Form::Paged(16)), (&LLAMA, Form::Contiguous), (&LLAMA, Form::Paged(16))]
    {
        let mut rows = Rows::of(shape, form);
        for &tokens in lengths {
            rows.add(Batch::One(tokens), 2, if form == Form::Contiguous { &CONTIGUOUS } else { &PAGED });
        }
        all.extend(rows.all);
    }
    all
}

/// The rows whose names have all words of a filter; of several filters, of any. Without a filter all.
///
/// # Errors
/// [`BenchError::NoRows`] for a filter that selects none.
pub fn select(rows: Vec<Row>, filters: &[String]) -> Result<Vec<Row>, BenchError> {
    let fits = |row: &Row, filter: &String| {
        let name = row.name();
        let words: Vec<&str> = name.split(' ').collect();
        filter.split_whitespace().all(|word| words.contains(&word))
    };
    for filter in filters {
        if filter.trim().is_empty() || !rows.iter().any(|row| fits(row, filter)) {
            let example = rows.first().map(Row::name).unwrap_or_default();
            return Err(BenchError::NoRows { filter: filter.clone(), example });
        }
    }
    Ok(rows.into_iter().filter(|row| filters.is_empty() || filters.iter().any(|filter| fits(row, filter))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_distinct_and_caches_fit() {
        for rows in [on_cuda(false), on_cuda(true), on_cpu(false), on_cpu(true)] {
            let mut names: Vec<String> = rows.iter().map(Row::name).collect();
            let count = names.len();
            names.sort();
            names.dedup();
            assert_eq!(names.len(), count);
            for row in rows {
                let tokens = row.batch.lengths().iter().map(|&tokens| row.form.room(tokens)).sum();
                assert!(row.shape.cache_bytes(tokens) <= MOST_BYTES, "{}", row.name());
            }
        }
        assert!((55..=65).contains(&core().len()), "{} rows in the core set", core().len());
    }

    #[test]
    fn the_core_set_is_part_of_the_whole() {
        let all = on_cuda(true);
        for row in on_cuda(false) {
            assert!(all.contains(&row), "{} is not in the whole set", row.name());
        }
    }

    #[test]
    fn rows_of_one_shape_and_layout_stand_together() {
        for rows in [on_cuda(false), on_cuda(true), on_cpu(true)] {
            let mut groups: Vec<_> = rows.iter().map(|row| (row.shape.name, row.form.name())).collect();
            groups.dedup();
            let changes = groups.len();
            groups.sort();
            groups.dedup();
            assert_eq!(groups.len(), changes);
        }
    }

    #[test]
    fn words_select_rows() {
        let names = |filters: &[&str]| {
            let filters: Vec<String> = filters.iter().map(|&filter| filter.to_owned()).collect();
            select(core(), &filters).map(|rows| rows.iter().map(Row::name).collect::<Vec<_>>())
        };
        assert_eq!(names(&["llava-1.5-7b key_norm"]).unwrap(), ["llava-1.5-7b contiguous 4096 1/2 key_norm"]);
        assert_eq!(names(&["qwen3-8b", "smollm2-135m"]).unwrap().len(), 5);
        // Whole words: `attention-6` is not `attention-64`.
        for filter in ["attention-6", "llama-3.1-8b paged-16 1024", " "] {
            let error = names(&[filter]).unwrap_err().to_string();
            assert!(error.contains(filter) && error.contains("llama-3.1-8b contiguous"), "{error}");
        }
    }
}
