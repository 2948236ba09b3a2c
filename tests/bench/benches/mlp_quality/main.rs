//! What `mlp-decouple` with its trained weights costs in quality, against what needs no training, through the plugins'
//! shared libraries and a bf16 cache.
//!
//!     cargo bench -p kvhook-bench --bench mlp_quality -- --texts FOLDER --linear linear-f2.safetensors linear-f4.safetensors
//!
//! A passage is `T` tokens of prompt and 256 scored ones. The prompt without its last token is prefilled once and shared
//! by all arms as a prefix; an arm compresses it to the same number of rows, with the same sinks and recent rows, as the
//! others of its factor; then the last token and the scored ones are fed at their logical positions. KL is that to the
//! uncompressed cache in nats a token, mean and standard error over passages.
//!
//! Stride, means and the trained linear map (`train.py --linear-out`; none without `--linear`) are weight files for the
//! same plugin, see [`kvhook_bench::linear_map`]. With `truncate` an arm of its `history=stride` runs too: it takes other
//! rows of the groups than the last, but at `f` = 2 without a tail, where both arms must agree (the first line printed).
//!
//! Passkeys: does a five-digit number in 1,024 tokens come out, asked for after compression. Copy: a list of random words
//! stands in the prompt, which ends in asking for it again; top-1 agreement with the list while it is fed.
//!
//! Gate: KL of the trained MLP is below that of uniform stride, one-sided paired t test, p < 0.01, at each `f` and `T`.
//! The same figures on every machine, by the engine's exactness.
//!
//! It takes hours on few cores: a passage about 40 core seconds at `T` = 1,024 and 140 at 4,096 on Zen 4. `--out` is written
//! after each passage, and `--resume` goes on from there; parts that ran on different machines may be put together so.

mod arms;
mod report;
mod results;
mod tasks;
mod work;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use kvhook_bench::measure::{Gates, cores, print_machine};
use kvhook_bench::{Result, error, model, passages};

/// Quality of mlp-decouple with its trained weights, by plugin.
#[derive(Debug, Parser)]
struct Args {
    /// Writes every value as JSON, again and again while it runs
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Takes values from the JSON of an interrupted run with the same plugins, weights and texts
    #[arg(long, value_name = "FILE")]
    resume: Option<PathBuf>,
    /// Passages that run side by side; default: one on each core
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Folder of .txt files, none of which was trained on
    #[arg(long, value_name = "FOLDER", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../text"))]
    texts: PathBuf,
    /// Folder of smollm2-135m-f2.safetensors and -f4.safetensors
    #[arg(
        long,
        value_name = "FOLDER",
        default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../../plugins/mlp-decouple/trained")
    )]
    weights: PathBuf,
    /// Trained linear maps, as train.py writes them with --linear-out
    #[arg(long, value_name = "FILE", num_args = 1..)]
    linear: Vec<PathBuf>,
    /// Tokens of the prompts, T
    #[arg(long, value_name = "T", value_delimiter = ',', default_value = "512,1024,4096")]
    prompts: Vec<usize>,
    /// Passages for each T, over all texts
    #[arg(long, value_name = "N", default_value_t = 32)]
    passages: usize,
    /// Prompts with a passkey
    #[arg(long, value_name = "N", default_value_t = 24)]
    passkeys: usize,
    /// Lists to be copied
    #[arg(long, value_name = "N", default_value_t = 12)]
    copies: usize,
    /// Set by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    error::exit(run(&Args::parse()))
}

fn run(args: &Args) -> Result<Gates> {
    let begun = Instant::now();
    let model = model::load()?;
    let texts = passages::texts(&args.texts, &model.tokenizer)?;
    let weights = arms::WeightFiles::prepare(&args.weights, &args.linear, model.config.layers)?;
    let groups = tasks::groups(args, &model.tokenizer, &texts, &weights)?;
    let mut gates = Gates::default();
    print_machine();
    for text in &texts {
        println!("text {}: {} tokens", text.name, text.tokens.len());
    }
    if let Some(text) = texts.first() {
        work::check_stride(&model, text, &weights, &mut gates)?;
    }
    let known = match &args.resume {
        Some(path) => results::read(path, &texts, &groups)?,
        None => groups.iter().map(|group| vec![Vec::new(); group.tasks.len()]).collect(),
    };
    let save = |measured: &[work::Measured]| match &args.out {
        Some(path) => results::write(path, &texts, &groups, measured),
        None => Ok(()),
    };
    let measured = work::run(&model, &groups, args.threads.unwrap_or_else(cores), known, &save)?;
    for (group, measured) in groups.iter().zip(&measured) {
        report::table(group, measured, &mut gates);
    }
    save(&measured)?;
    println!("\n{:.0} s in all", begun.elapsed().as_secs_f64());
    Ok(gates)
}
