//! A scorer for caches in ordinary memory and on CUDA devices: keeps the entries whose values are long.

use kvhook_abi::cuda::norms::{RowNorms, Sign};
use kvhook_abi::cuda::{self, Device, DeviceSlice, Job, Scratch};
use kvhook_abi::kernels::norms::row_norms;
use kvhook_abi::{Call, CreateContext, LayerView, NoConfig, PluginError, Scorer, export_scorer};

struct ValueNorm;

impl Scorer for ValueNorm {
    type Config = NoConfig;
    const ID: &'static str = "value_norm_cuda";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const ON_DEVICE: bool = true;

    fn create(_: &CreateContext<'_>, _: NoConfig) -> Result<Self, PluginError> {
        Ok(Self)
    }

    fn score(&self, layer: &LayerView<'_>, head: usize, scores: &mut [f32]) -> Result<(), PluginError> {
        Ok(row_norms(&layer.v()?, head..head + 1, 0..layer.length(), scores)?)
    }

    fn score_on_device(
        &self,
        device: &Device,
        call: &Call<'_>,
        jobs: &[Job<'_>],
        scores: &[DeviceSlice<f32>],
        _: &mut Scratch<'_>,
    ) -> Result<(), PluginError> {
        let item = |(job, &out): (&Job<'_>, &DeviceSlice<f32>)| {
            Ok(RowNorms { rows: job.layer.v_device()?, tokens: 0..job.layer.length(), out })
        };
        let items = jobs.iter().zip(scores).map(item).collect::<Result<Vec<_>, PluginError>>()?;
        Ok(cuda::norms::row_norms(device, call.cuda_stream()?, &items, Sign::Positive)?)
    }
}

export_scorer!(ValueNorm);
