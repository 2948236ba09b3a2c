//! Tasks on threads.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::HashSet;
use std::sync::{Barrier, Mutex};
use std::thread;

use kvhook_kernels::parallel::{BYTES_PER_THREAD, for_each, for_each_on, threads_for};

#[test]
fn each_task_runs_once_and_the_first_error_by_order_wins() {
    for threads in [1, 2, 8] {
        let seen = Mutex::new(Vec::new());
        let result = for_each_on(threads, (0..100).collect(), |task| {
            seen.lock().unwrap().push(task);
            if task % 30 == 17 { Err(task) } else { Ok(()) }
        });
        assert_eq!(result, Err(17));
        let mut seen = seen.into_inner().unwrap();
        seen.sort_unstable();
        assert_eq!(seen, (0..100).collect::<Vec<_>>());
    }
}

#[test]
fn tasks_run_side_by_side() {
    // Passes only when three threads are inside tasks at once.
    let barrier = Barrier::new(3);
    let ids = Mutex::new(HashSet::new());
    let result: Result<(), ()> = for_each_on(3, vec![(); 3], |()| {
        barrier.wait();
        ids.lock().unwrap().insert(thread::current().id());
        Ok(())
    });
    assert_eq!(result, Ok(()));
    let ids = ids.into_inner().unwrap();
    assert_eq!(ids.len(), 3);
    assert!(ids.contains(&thread::current().id()));
}

#[test]
fn little_work_stays_on_its_thread() {
    assert_eq!(threads_for(100, BYTES_PER_THREAD - 1), 1);
    assert_eq!(threads_for(0, usize::MAX), 1);
    assert_eq!(threads_for(1, usize::MAX), 1);
    let here = thread::current().id();
    let result = for_each(vec![(); 50], 1000, |()| if thread::current().id() == here { Ok(()) } else { Err(()) });
    assert_eq!(result, Ok(()));
}

#[test]
fn a_panic_reaches_the_caller() {
    for threads in [1, 3] {
        let caught = std::panic::catch_unwind(|| {
            for_each_on(threads, (0..10).collect(), |task| -> Result<(), ()> {
                assert_ne!(task, 4, "task four");
                Ok(())
            })
        });
        assert!(caught.is_err());
    }
}
