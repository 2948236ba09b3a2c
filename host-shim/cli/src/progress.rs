//! Progress on standard error; silent when that is not a terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar that removes itself when it is finished or dropped.
#[derive(Debug)]
pub struct Progress(ProgressBar);

impl Progress {
    /// A bar over `total` bytes, such as a download.
    pub fn bytes(title: &str, total: u64) -> Self {
        Self::new(title, total, "{msg} {wide_bar} {bytes}/{total_bytes} {eta}")
    }

    /// A bar over `total` steps, such as passages times arms.
    pub fn steps(title: &str, total: u64) -> Self {
        Self::new(title, total, "{msg} {wide_bar} {pos}/{len} {eta}")
    }

    fn new(title: &str, total: u64, template: &str) -> Self {
        // The target hides itself where standard error is not a terminal.
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(title.to_owned());
        bar.enable_steady_tick(Duration::from_millis(200));
        Self(bar)
    }

    /// Moves to `position`, no further than the total.
    pub fn set(&self, position: u64) {
        self.0.set_position(position.min(self.0.length().unwrap_or(position)));
    }

    /// One step further.
    pub fn step(&self) {
        self.0.inc(1);
    }

    /// Says what is going on now.
    pub fn say(&self, message: &str) {
        self.0.set_message(message.to_owned());
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
