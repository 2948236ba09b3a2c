//! `kvhook bench`: what compressions cost on this machine, beside the least that its memory and arithmetic allow.
//!
//! * [`shapes`] are the caches, [`rows`] what is done to them.
//! * [`machine`] is where a cache lies and how time is taken there; [`cpu`] and `cuda` are the two of them.
//! * [`cache`] is a cache of one row; [`engine`] compresses it through the host, with the plugins that users load.
//! * [`mod@floors`] are the least times; [`report`] holds what was measured, [`table`] shows it, [`peers`] brings what
//!   other programs took.

pub mod cache;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod engine;
pub mod error;
pub mod floors;
pub mod machine;
pub mod mlp_file;
pub mod peers;
pub mod report;
pub mod rows;
pub mod shapes;
pub mod table;

use crate::args::{Bench, BenchDevice};
use crate::error::CliError;
use cache::Cache;
use cpu::Cpu;
use engine::{Compression, Engine};
use error::BenchError;
use floors::{H100_PRODUCTS, Rates, floors};
use machine::{Machine, Measured, Work};
use peers::Peers;
use report::{Failure, Measurement, Report};
use rows::{Operation, Row};

/// Measures every row that the options select, and hands the report to `show` with each. A row that cannot be measured is
/// one of the report's failures, and the others go on.
///
/// # Errors
/// [`BenchError`] in [`CliError::Bench`], also where a device is lost; files that cannot be read; a host that is refused.
pub fn run(options: &Bench, show: &mut dyn FnMut(&Report)) -> Result<Report, CliError> {
    let peers = options.peers.as_deref().map(Peers::read).transpose()?;
    let all = match options.device {
        BenchDevice::Cpu => rows::on_cpu(options.full),
        BenchDevice::Cuda => rows::on_cuda(options.full),
    };
    let rows = rows::select(all, &options.rows)?;
    let machine = open(options.device)?;
    let products = match options.device {
        BenchDevice::Cpu => None,
        BenchDevice::Cuda => Some(peers.as_ref().and_then(|peers| peers.products).unwrap_or(H100_PRODUCTS)),
    };
    let rates = Rates { copy: machine.copy_bandwidth()?, products, exponentials: machine.exponentials() };
    let mut report = Report::new(machine.describe(), &rates, peers.as_ref());
    let mut next = rows.as_slice();
    while let Some(first) = next.first() {
        // Rows of one shape and layout share a host, as requests of one model do.
        let count = next.iter().take_while(|row| row.shape == first.shape && row.form == first.form).count();
        let mut engine = Engine::new(&*machine, first.shape, first.form)?;
        for row in &next[..count] {
            match measure(&*machine, &mut engine, row) {
                Ok((measured, in_plugin)) => {
                    report.rows.push(Measurement::new(row, &measured, in_plugin, floors(row, &rates)));
                    show(&report);
                }
                // Whatever comes next would fail, too.
                Err(source @ (BenchError::Driver { .. } | BenchError::NoVerdict { .. })) => {
                    return Err(BenchError::Row { row: row.name(), source: Box::new(source) }.into());
                }
                Err(error) => report.failed.push(Failure { row: row.name(), why: error.to_string() }),
            }
        }
        next = &next[count..];
    }
    Ok(report)
}

/// Times of a row, and the plugin's mean seconds in a call.
fn measure<'a>(
    machine: &'a dyn Machine,
    engine: &mut Engine<'a>,
    row: &Row,
) -> Result<(Measured, Option<f64>), BenchError> {
    let cache = Cache::new(machine, row)?;
    let mut work: Box<dyn Work + '_> = match row.operation {
        Operation::Commit => machine.moves(&cache, row, false)?,
        Operation::TopK => machine.moves(&cache, row, true)?,
        _ => Box::new(Compression::new(machine, engine, &cache, row)?),
    };
    match machine.measure(&mut *work) {
        Ok(measured) => Ok((measured, work.in_plugin())),
        Err(error) => {
            // The host serves the rows that follow: nothing of this one stays in it. What failed first is told.
            let _ = work.tear_down();
            Err(error)
        }
    }
}

fn open(device: BenchDevice) -> Result<Box<dyn Machine>, CliError> {
    match device {
        BenchDevice::Cpu => Ok(Box::new(Cpu::new())),
        #[cfg(feature = "cuda")]
        BenchDevice::Cuda => Ok(Box::new(cuda::Cuda::open()?)),
        #[cfg(not(feature = "cuda"))]
        BenchDevice::Cuda => Err(BenchError::BuiltWithoutCuda.into()),
    }
}
