//! The commonest way to make plans in ordinary memory: lay out what is to be done for each sequence, then do all of it on all
//! cores. What fails keeps its own sequence.

use std::fmt::Display;
use std::sync::{Mutex, PoisonError};

use kvhook_kernels::parallel;

use crate::error::PluginError;
use crate::offers::Reason;
use crate::plan::{Plan, Request, Requests};
use crate::view::SequenceView;

/// Why a plugin keeps a sequence as it is. Its text goes with the reason.
pub trait Kept: Display + Send {
    /// The number that the host counts.
    fn reason(&self) -> Reason;
}

/// The plans of one call, and the tasks that fill them.
pub struct Tasks<'a, T> {
    plans: Vec<Plan<'a>>,
    /// Each with the index of its plan.
    tasks: Vec<(usize, T)>,
}

impl<'a, T: Send> Tasks<'a, T> {
    /// Asks `lay_out` for each sequence: it fills what it can of the plan, and adds tasks for the rest.
    ///
    /// # Errors
    /// The host described the call badly. What `lay_out` answers keeps that sequence, and its tasks are dropped.
    pub fn lay_out<K: Kept>(
        requests: Requests<'a>,
        mut lay_out: impl FnMut(&SequenceView<'a>, &mut Plan<'a>, &mut Vec<T>) -> Result<(), K>,
    ) -> Result<Self, PluginError> {
        let (mut plans, mut tasks) = (Vec::with_capacity(requests.len()), Vec::new());
        for request in requests {
            let Request { sequence, mut plan } = request?;
            let mut of_sequence = Vec::new();
            match lay_out(&sequence, &mut plan, &mut of_sequence) {
                Ok(()) => tasks.extend(of_sequence.into_iter().map(|task| (plans.len(), task))),
                Err(kept) => plan.keep(kept.reason(), &kept.to_string())?,
            }
            plans.push(plan);
        }
        Ok(Self { plans, tasks })
    }

    /// The tasks, in their order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &T> {
        self.tasks.iter().map(|(_, task)| task)
    }

    /// Runs all tasks on so many threads ([`parallel::threads_for`]). The first failure of each sequence keeps it: by the order
    /// of its tasks, whichever thread was faster.
    ///
    /// # Errors
    /// The host's plan is broken.
    pub fn run<K: Kept>(mut self, threads: usize, run: impl Fn(T) -> Result<(), K> + Sync) -> Result<(), PluginError> {
        let failures: Mutex<Vec<Option<(usize, K)>>> = Mutex::new(self.plans.iter().map(|_| None).collect());
        let tasks = self.tasks.into_iter().enumerate().collect();
        parallel::for_each_on(threads, tasks, |(order, (plan, task)): (usize, (usize, T))| {
            if let Err(kept) = run(task) {
                let mut failures = failures.lock().unwrap_or_else(PoisonError::into_inner);
                let first = &mut failures[plan];
                if first.as_ref().is_none_or(|(earlier, _)| order < *earlier) {
                    *first = Some((order, kept));
                }
            }
            Ok::<(), PluginError>(())
        })?;
        let failures = failures.into_inner().unwrap_or_else(PoisonError::into_inner);
        for (plan, failure) in self.plans.iter_mut().zip(failures) {
            if let Some((_, kept)) = failure {
                plan.keep(kept.reason(), &kept.to_string())?;
            }
        }
        Ok(())
    }
}
