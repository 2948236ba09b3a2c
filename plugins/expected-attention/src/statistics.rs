//! Mean and covariance of a layer's queries before RoPE, of each query head.

use std::ops::Range;

use kvhook_abi::PluginError;
use kvhook_abi::kernels::{Rows, parallel};

use crate::rope::Turn;

/// Sums over the queries of one layer of one sequence.
///
/// Each sum runs over tokens in their order, so the same prompt gives the same bits in steps of any size.
#[derive(Clone, Default)]
pub struct Statistics {
    count: u64,
    channels: usize,
    heads: Vec<Sums>,
}

/// Sums over the queries of one head, less the first of them: they lose no digits where queries are all alike.
#[derive(Clone, Default)]
struct Sums {
    origin: Vec<f32>,
    sums: Vec<f32>,
    /// Of products: the upper triangle, row by row. Empty: only the mean is wanted.
    products: Vec<f32>,
}

/// What is expected of the queries of one head.
pub struct Expected {
    /// Their mean.
    pub mean: Vec<f32>,
    /// The quadratic form of their covariance as an upper triangle, row by row, elements off the diagonal doubled:
    /// `y' C y` is the sum of `form[i, j] y[i] y[j]` over `i <= j`. Empty: zero.
    pub form: Vec<f32>,
}

impl Statistics {
    /// Adds the queries of `tokens`, each turned back by its turn.
    ///
    /// # Errors
    /// Queries have another shape than the sequence's earlier ones, or cannot be read.
    pub fn add(
        &mut self,
        queries: &Rows,
        tokens: Range<usize>,
        turns: &[Turn],
        covariance: bool,
    ) -> Result<(), PluginError> {
        let (heads, channels) = (queries.kv_heads(), queries.head_dim());
        if self.heads.is_empty() {
            (self.heads, self.channels) = (vec![Sums::default(); heads], channels);
        }
        if (self.heads.len(), self.channels) != (heads, channels) {
            return Err(PluginError::InvalidArgument(format!(
                "queries of {heads} heads of {channels} channels; the sequence's earlier ones have {} of {}",
                self.heads.len(),
                self.channels
            )));
        }
        let elements = tokens.len() * channels;
        let touched = heads * elements * if covariance { channels } else { 1 } * size_of::<f32>();
        self.count += tokens.len() as u64;
        let tasks = self.heads.iter_mut().enumerate().collect();
        parallel::for_each(tasks, touched, |(head, sums): (usize, &mut Sums)| {
            let mut rows = vec![0.0; elements];
            queries.load_many(head, tokens.clone(), &mut rows)?;
            for (row, turn) in rows.chunks_exact_mut(channels).zip(turns) {
                turn.back(row);
                sums.add(row, covariance);
            }
            Ok(())
        })
    }

    /// What is expected of each query head that looks at KV head `head` of `kv_heads`.
    ///
    /// # Errors
    /// The heads do not share the KV heads evenly.
    pub fn of_head(&self, head: usize, kv_heads: usize) -> Result<Vec<Expected>, PluginError> {
        let group = self.heads.len() / kv_heads.max(1);
        let heads = self.heads.get(head * group..(head + 1) * group);
        match heads {
            Some(heads) if group * kv_heads == self.heads.len() => {
                Ok(heads.iter().map(|sums| sums.expected(self.count, self.channels)).collect())
            }
            _ => {
                let found = self.heads.len();
                Err(PluginError::InvalidArgument(format!("{found} query heads look at {kv_heads} KV heads")))
            }
        }
    }
}

impl Sums {
    fn add(&mut self, query: &[f32], covariance: bool) {
        let channels = query.len();
        if self.origin.is_empty() {
            self.origin = query.to_vec();
            self.sums = vec![0.0; channels];
            self.products = vec![0.0; if covariance { channels * (channels + 1) / 2 } else { 0 }];
        }
        let query: Vec<f32> = query.iter().zip(&self.origin).map(|(value, origin)| value - origin).collect();
        self.sums.iter_mut().zip(&query).for_each(|(sum, value)| *sum += value);
        let mut products = self.products.as_mut_slice();
        for i in 0..if covariance { channels } else { 0 } {
            let (row, rest) = products.split_at_mut(channels - i);
            row.iter_mut().zip(&query[i..]).for_each(|(sum, value)| *sum += query[i] * value);
            products = rest;
        }
    }

    /// Where no query was seen, none is expected to prefer a key.
    fn expected(&self, count: u64, channels: usize) -> Expected {
        if self.origin.is_empty() {
            return Expected { mean: vec![0.0; channels], form: Vec::new() };
        }
        let share = 1.0 / count as f64;
        // Means less the origin.
        let means: Vec<f64> = self.sums.iter().map(|sum| f64::from(*sum) * share).collect();
        let mean = self.origin.iter().zip(&means).map(|(origin, mean)| (f64::from(*origin) + mean) as f32).collect();
        let pairs = (0..channels).flat_map(|i| (i..channels).map(move |j| (i, j)));
        let form = self.products.iter().zip(pairs).map(|(sum, (i, j))| {
            let covariance = f64::from(*sum) * share - means[i] * means[j];
            (if i == j { covariance } else { 2.0 * covariance }) as f32
        });
        Expected { mean, form: form.collect() }
    }
}
