//! Plugins are swapped all the time while 64 sequences and more are in flight, and many of the plugins fail.
//!
//! No sequence is lost, each answers as its arm's plugin and config answer it alone, and nothing is left behind: memory,
//! open files, threads, instances. `KVHOOK_SWAPS` says how many swaps (10,000 in `docs/results.md`), `KVHOOK_SEED` which.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use kvhook_e2e::model::CONTIGUOUS;
use kvhook_e2e::plugins::{Place, built};
use kvhook_e2e::tiny::{self, Random, VOCAB};
use kvhook_engine::cache::{CacheConfig, CacheKind};
use kvhook_engine::hooks::Source;
use kvhook_engine::quality::argmax;
use kvhook_engine::{
    ArmConfig, Begin, Engine, EngineConfig, Event, FinishReason, KvPlugins, Model, PluginConfig, Request, RequestId,
    Runner, Scoring, SequenceReport,
};
use kvhook_host::instance::live_instances;
use serde_json::{Value, json};

/// In flight at any time.
const AT_LEAST: usize = 64;
/// Requests that the engine has.
const REQUESTS: usize = 96;
/// Tokens of each prompt.
const PROMPT: usize = 48;
/// Most tokens of an answer: the prompt's end and two times of growth, and some behind each.
const ANSWER: usize = 42;
const EVERY: usize = 16;
/// Steps between prepare and commit.
const LAG: usize = 2;
const RANKS: usize = 2;
const PROMPTS: usize = 12;
const ARMS: [&str; 3] = ["a", "b", "c"];

/// A plugin with a config. Each keeps another number of a prompt's rows, so that a commit says whose it is.
struct Choice {
    plugin: &'static str,
    config: String,
    /// Rows that it keeps of some.
    keeps: Box<dyn Fn(usize) -> usize + Send + Sync>,
}

fn menu() -> Vec<Choice> {
    let truncate = |budget: usize, rest: &str| Choice {
        plugin: "truncate",
        config: format!("budget={budget},sinks=2,recent=4{rest}"),
        keeps: Box::new(move |rows| rows.min(budget)),
    };
    let faulty = |rows: usize, rest: &str| {
        let keep = (rows as f64 + 0.5) / PROMPT as f64;
        Choice {
            plugin: "faulty",
            config: format!("keep={keep}{rest}"),
            keeps: Box::new(move |rows| ((rows as f64 * keep) as usize).max(1)),
        }
    };
    vec![
        truncate(12, ""),
        truncate(16, ",history=top"),
        // These two hold state for a sequence from its prompt to its end, and compress as it grows.
        truncate(20, ",history=top,importance=attention,window=4,every=16"),
        faulty(36, ",plan=ranges,phases=1,window=4,every=16,allocate=64,must=16"),
        truncate(24, ",history=stride"),
        faulty(28, ""),
        faulty(32, ",plan=select-heads"),
        faulty(8, ",plan=rewrite,must=32"),
        Choice { plugin: "noop", config: "observe=all".into(), keeps: Box::new(|rows| rows) },
    ]
}

/// What goes wrong with a plugin that is `faulty`, after some calls.
const FAULTS: [&str; 20] = [
    "prefill_done=fail",
    "prefill_done=panic",
    "prefill_done=out-of-memory",
    "bound=fail",
    "bound=panic",
    "grown=panic",
    "before_attention=fail",
    "before_attention=panic",
    "free=fail",
    "free=panic",
    "destroy=panic",
    "damage=out-of-range",
    "damage=descending",
    "damage=too-many",
    "damage=no-rows",
    "damage=null-array",
    "damage=unknown-kind",
    "answer=above",
    "answer=zero",
    "answer=too-short",
];

/// What cannot be loaded: nothing changes.
const REFUSED: [(&str, &str); 5] = [
    ("faulty", "create=fail"),
    ("faulty", "create=panic"),
    ("faulty", "needs=panic"),
    ("truncate", "keep=7"),
    ("no-such-plugin", ""),
];

/// A plugin that an arm had, from one moment to another.
struct Installed {
    arm: &'static str,
    choice: usize,
    from: u64,
    to: u64,
}

/// What the thread that swaps and the one that serves have in common.
struct Shared {
    plugins: Arc<KvPlugins>,
    menu: Vec<Choice>,
    /// Counts moments: before and behind each command.
    clock: AtomicU64,
    installed: Mutex<Vec<Installed>>,
    /// Held during each step.
    step: Mutex<()>,
    in_flight: AtomicUsize,
    done: AtomicBool,
}

impl Shared {
    fn control(&self, changes: &Value) -> bool {
        self.plugins.control(&json!({ "changes": changes }).to_string(), Source::Operator).is_ok()
    }

    fn arms(&self) -> Value {
        serde_json::from_str(&self.plugins.arms_json().unwrap()).unwrap()
    }

    /// Gives an arm a plugin that may fail. Whether another one was there.
    fn install(&self, verb: &str, arm: &'static str, choice: usize, fault: &str) {
        let Choice { plugin, config, .. } = &self.menu[choice];
        let config = format!("{config}{fault}");
        let from = self.clock.fetch_add(1, SeqCst);
        // Noted before: a sequence may have it, and end, before the command returns.
        self.installed.lock().unwrap().push(Installed { arm, choice, from, to: u64::MAX });
        assert!(self.control(&json!([{verb: {"name": arm, "plugin": plugin, "config": config}}])), "{config}");
        let now = self.clock.fetch_add(1, SeqCst);
        let mut installed = self.installed.lock().unwrap();
        let before = installed.iter_mut().rev().filter(|other| other.arm == arm).nth(1);
        before.into_iter().for_each(|before| before.to = now);
    }

    /// Whether an arm, or any where none is named, had the plugin at a moment between these.
    fn had(&self, arm: Option<&str>, choice: usize, begin: u64, end: u64) -> bool {
        self.installed.lock().unwrap().iter().any(|installed| {
            let of_arm = arm.is_none_or(|arm| arm == installed.arm);
            of_arm && installed.choice == choice && installed.from <= end && installed.to >= begin
        })
    }

    /// With no step and no command under way, instances are those of the arms, and the older ones that a sequence needs.
    fn check_instances(&self, faulty: &FaultyCount) {
        let arms = self.arms();
        let (now, older) = (arms["arms"].as_array().unwrap(), arms["older"].as_array().unwrap());
        assert!(older.iter().all(|older| older["sequences"].as_u64() > Some(0)), "{older:?}");
        // And those of the engine that serves one sequence alone.
        assert_eq!(live_instances(), RANKS * (now.len() + older.len() + 1));
        let of_faulty = now.iter().chain(older).filter(|arm| arm["plugin"] == "faulty").count();
        assert_eq!(faulty.live(), (RANKS * of_faulty) as u64);
    }

    /// Makes so many swaps, and all that an operator may do between them.
    fn swap(&self, swaps: usize, random: &mut Random, faulty: &FaultyCount) -> Swapped {
        let mut swapped = Swapped::default();
        while swapped.swaps < swaps {
            let in_flight = self.in_flight.load(SeqCst);
            assert!(in_flight >= AT_LEAST, "{in_flight} sequences are in flight");
            let arm = *random.of(&ARMS);
            match random.below(24) {
                0 => {
                    let (plugin, config) = *random.of(&REFUSED);
                    let command =
                        json!([{"weights": {arm: 9}}, {"replace": {"name": arm, "plugin": plugin, "config": config}}]);
                    assert!(!self.control(&command), "{plugin} {config}");
                    swapped.refused += 1;
                }
                1 => {
                    let state = *random.of(&["shadow", "draining", "disabled", "serving"]);
                    assert!(self.control(&json!([{"state": {arm: state}}])));
                }
                2 => assert!(self.control(&json!([{"weights": {arm: random.below(4)}}]))),
                // An arm that comes and goes, with a guard.
                3 => {
                    let there = self.arms()["arms"].as_array().unwrap().len() > ARMS.len();
                    if there {
                        assert!(self.control(&json!([{"remove": "d"}])));
                    } else {
                        self.install("add", "d", random.below(self.menu.len()), "");
                        assert!(self.control(&json!([{"guard": {"d": {"failed": 0.2, "sequences": 5}}}])));
                    }
                }
                4 if random.below(4) == 0 => {
                    assert!(self.control(&json!([{"safe_mode": true}])));
                    assert!(self.control(&json!([{"safe_mode": false}])));
                }
                _ => {
                    let choice = random.below(self.menu.len());
                    let mut fault = String::new();
                    if self.menu[choice].plugin == "faulty" && random.below(2) == 0 {
                        fault = format!(",{},after={}", random.of(&FAULTS), random.below(30));
                    }
                    self.install("replace", arm, choice, &fault);
                    swapped.swaps += 1;
                    if random.below(2) == 0 {
                        assert!(self.control(&json!([{"state": {arm: "serving"}}])));
                    }
                }
            }
            if random.below(20) == 0 {
                let _step = self.step.lock().unwrap();
                self.check_instances(faulty);
                swapped.most = swapped.most.max(live_instances());
            }
        }
        assert!(self.control(&json!([{"state": {"a": "serving", "b": "serving", "c": "serving"}}])));
        swapped
    }
}

#[derive(Debug, Default)]
struct Swapped {
    swaps: usize,
    refused: usize,
    /// The most instances that were alive.
    most: usize,
}

/// The count that `faulty` keeps by itself.
struct FaultyCount {
    library: libloading::Library,
}

impl FaultyCount {
    /// Looks for the library that the host has loaded.
    fn find(place: &Place) -> Self {
        let of = |file: std::io::Result<std::fs::DirEntry>| {
            // SAFETY: a plugin that the host has loaded already.
            let library = unsafe { libloading::Library::new(file.unwrap().path()).unwrap() };
            // SAFETY: its type in `kvhook-faulty`.
            let is_faulty = unsafe { library.get::<extern "C" fn() -> u64>("kvhook_faulty_created").is_ok() };
            is_faulty.then_some(library)
        };
        Self { library: std::fs::read_dir(place.copies()).unwrap().find_map(of).unwrap() }
    }

    fn live(&self) -> u64 {
        // SAFETY: as above.
        let read = |name: &str| unsafe { self.library.get::<extern "C" fn() -> u64>(name).unwrap()() };
        read("kvhook_faulty_created") - read("kvhook_faulty_destroyed")
    }
}

/// What a commit took away: position of the next token, rows before, rows after.
type Commits = Vec<(u32, usize, usize)>;

fn commits_of(report: &SequenceReport) -> Commits {
    let commit = |commit: &kvhook_engine::hooks::CommitReport| {
        let (before, after) = (&commit.lengths_before, &commit.lengths_after);
        assert!(before.iter().all(|rows| rows == &before[0]) && after.iter().all(|rows| rows == &after[0]));
        (commit.position, before[0], after[0])
    };
    report.commits.iter().map(commit).collect()
}

/// A request on its way.
struct Live {
    prompt: usize,
    arm: Option<&'static str>,
    most: usize,
    answer: Vec<u32>,
    began: u64,
    commits: Commits,
    /// When the first commit was seen.
    seen: u64,
    cancelled: bool,
}

/// Answers one sequence at a time, with no other beside it, in a cache of another kind.
struct Alone {
    runner: Runner,
    prompts: Vec<Vec<u32>>,
    known: HashMap<(usize, Option<usize>, Commits), Vec<u32>>,
}

impl Alone {
    fn new(model: &Arc<Model>, place: &Place, prompts: &[Vec<u32>]) -> Self {
        let plugins = PluginConfig { arms: vec![ArmConfig::new("alone", "noop", "")], ..config_of(place) };
        let cache = CacheConfig { ranks: RANKS, ..CONTIGUOUS };
        let runner = Runner::with_plugins(model.clone(), cache, &plugins).unwrap();
        Self { runner, prompts: prompts.to_vec(), known: HashMap::new() }
    }

    /// The answer to a prompt on a plugin without faults that commits at these positions, and only there.
    fn answer(&mut self, prompt: usize, choice: Option<(usize, &Choice)>, commits: &Commits) -> &[u32] {
        let key = (prompt, choice.map(|(index, _)| index), commits.clone());
        if !self.known.contains_key(&key) {
            let answer = self.run(prompt, choice.map(|(_, choice)| choice), commits);
            self.known.insert(key.clone(), answer);
        }
        &self.known[&key]
    }

    fn run(&mut self, prompt: usize, choice: Option<&Choice>, commits: &Commits) -> Vec<u32> {
        let plugins = self.runner.plugins().unwrap().clone();
        let control =
            |change: Value| plugins.control(&json!({ "changes": [change] }).to_string(), Source::Operator).unwrap();
        if let Some(Choice { plugin, config, .. }) = choice {
            control(json!({"replace": {"name": "alone", "plugin": plugin, "config": config}}));
        }
        // Where nothing was committed the arm is a shadow: hooks run, and the plan is dropped.
        let allow = |position: usize| {
            let commits = commits.iter().any(|commit| commit.0 as usize == position + LAG);
            control(json!({"state": {"alone": if commits { "serving" } else { "shadow" }}}));
        };
        let arm = Some(if choice.is_some() { "alone" } else { "none" });
        allow(PROMPT);
        let begin = Begin { arm, ..Begin::new(&self.prompts[prompt]) };
        let (id, mut logits) = self.runner.prefill_on(&begin, 20).unwrap();
        let mut answer = Vec::new();
        for position in PROMPT + 1.. {
            answer.push(argmax(&logits));
            if answer.len() == ANSWER {
                break;
            }
            if (position - PROMPT).is_multiple_of(EVERY) {
                allow(position);
            }
            let last = [*answer.last().unwrap()];
            logits = self.runner.score(id, &last, Scoring::OneByOne).unwrap().remove(0);
        }
        let mut made = commits_of(&self.runner.report(id).unwrap());
        // The last one may have come with the last token, when nobody looked any more.
        made.truncate(commits.len());
        assert_eq!(&made, commits, "prompt {prompt}, {:?}", choice.map(|choice| &choice.config));
        self.runner.free(id).unwrap();
        control(json!({"replace": {"name": "alone", "plugin": "noop"}}));
        answer
    }
}

fn config_of(place: &Place) -> PluginConfig {
    PluginConfig {
        folders: vec![built()],
        copy_folder: Some(place.copies()),
        commit_lag: LAG,
        ..PluginConfig::default()
    }
}

/// Serves requests, always as many, until it is told to stop; then those that are left.
struct Server<'a> {
    shared: &'a Shared,
    engine: &'a mut Engine,
    alone: &'a mut Alone,
    live: HashMap<RequestId, Live>,
    served: Served,
}

#[derive(Debug, Default)]
struct Served {
    finished: usize,
    cancelled: usize,
    compressed: usize,
    steps: usize,
    /// Finished on each choice.
    of_choice: BTreeMap<usize, usize>,
}

impl Server<'_> {
    fn serve(&mut self, random: &mut Random) {
        while !self.shared.done.load(SeqCst) {
            while self.live.len() < REQUESTS {
                self.add(random);
            }
            if random.below(20) == 0 {
                self.cancel(random);
            }
            self.step();
        }
        while !self.live.is_empty() {
            self.step();
        }
    }

    fn add(&mut self, random: &mut Random) {
        let prompt = random.below(PROMPTS);
        let arm = (random.below(3) > 0).then(|| *random.of(&ARMS));
        let most = ANSWER - random.below(30);
        let request = Request {
            tokens: self.alone.prompts[prompt].clone(),
            max_new_tokens: most,
            arm: arm.map(Into::into),
            key: random.number().to_string(),
            ..Request::default()
        };
        let began = self.shared.clock.load(SeqCst);
        let id = self.engine.add(request).unwrap();
        let live =
            Live { prompt, arm, most, answer: Vec::new(), began, commits: Vec::new(), seen: 0, cancelled: false };
        self.live.insert(id, live);
        self.shared.in_flight.fetch_add(1, SeqCst);
    }

    fn cancel(&mut self, random: &mut Random) {
        let ids: Vec<_> = self.live.keys().copied().collect();
        let id = *random.of(&ids);
        self.live.get_mut(&id).unwrap().cancelled = true;
        self.engine.cancel(id).unwrap();
    }

    fn step(&mut self) {
        let events = {
            let _step = self.shared.step.lock().unwrap();
            self.engine.step().unwrap()
        };
        self.served.steps += 1;
        let mut ended = Vec::new();
        for event in events {
            match event {
                Event::Token { request, token } => self.live.get_mut(&request).unwrap().answer.push(token),
                Event::Preempted { .. } => panic!("there is room for all"),
                Event::Finished { request, reason } => ended.push((request, reason)),
            }
        }
        let now = self.shared.clock.load(SeqCst);
        for (id, live) in &mut self.live {
            if let Some(report) = self.engine.report(*id) {
                assert!(report.failures.is_empty(), "{:?}", report.failures);
                live.commits = commits_of(&report);
                if live.commits.len() == 1 && live.seen == 0 {
                    live.seen = now;
                }
            }
        }
        for (id, reason) in ended {
            let live = self.live.remove(&id).unwrap();
            self.shared.in_flight.fetch_sub(1, SeqCst);
            match reason {
                FinishReason::Cancelled if live.cancelled => self.served.cancelled += 1,
                FinishReason::Length => self.check(&live),
                other => panic!("{other:?}"),
            }
        }
    }

    /// The answer is that of one of the plugins that the arm had meanwhile.
    fn check(&mut self, live: &Live) {
        // Instances of the engine that serves it alone come and go.
        let _step = self.shared.step.lock().unwrap();
        assert_eq!(live.answer.len(), live.most);
        self.served.finished += 1;
        if live.commits.is_empty() {
            assert_eq!(live.answer, self.alone.answer(live.prompt, None, &Vec::new())[..live.most]);
            return;
        }
        self.served.compressed += 1;
        let mut grown = PROMPT;
        let mut rows = Vec::new();
        for &(position, before, after) in &live.commits {
            let planned = before - LAG;
            assert_eq!((position as usize - LAG - grown) % EVERY, 0);
            grown = position as usize - LAG;
            rows.push((planned, planned - (before - after)));
        }
        let keeps = |choice: &Choice| rows.iter().all(|&(planned, kept)| (choice.keeps)(planned) == kept);
        let mut choices = self.shared.menu.iter().enumerate().filter(|(_, choice)| keeps(choice));
        let choice = choices.next().unwrap_or_else(|| panic!("no plugin keeps so many rows: {:?}", live.commits));
        assert!(choices.next().is_none(), "a commit does not say whose it is");
        let had = self.shared.had(live.arm, choice.0, live.began, live.seen);
        assert!(had, "arm {:?} did not have {} meanwhile", live.arm, choice.1.config);
        *self.served.of_choice.entry(choice.0).or_default() += 1;
        let expected = self.alone.answer(live.prompt, Some(choice), &live.commits);
        assert_eq!(live.answer, expected[..live.most], "{}: {:?}", choice.1.config, live.commits);
    }
}

/// What a process holds when nothing is in flight.
#[derive(Debug)]
struct Held {
    /// In use, over all allocators of the C library.
    heap: usize,
    resident: usize,
    files: usize,
    threads: usize,
}

impl Held {
    fn now() -> Self {
        // SAFETY: glibc's function: what its allocators hold and nobody uses goes back to the system.
        unsafe { malloc_trim(0) };
        let entries = |folder: &str| std::fs::read_dir(folder).unwrap().count();
        let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
        let resident = pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096;
        // SAFETY: glibc's function; it takes nothing and answers by value.
        let heap = unsafe { mallinfo2() };
        Self {
            heap: heap.uordblks + heap.hblkhd,
            resident,
            files: entries("/proc/self/fd"),
            threads: entries("/proc/self/task"),
        }
    }
}

/// glibc's `struct mallinfo2`.
#[repr(C)]
struct Mallinfo2 {
    arena: usize,
    ordblks: usize,
    smblks: usize,
    hblks: usize,
    hblkhd: usize,
    usmblks: usize,
    fsmblks: usize,
    uordblks: usize,
    fordblks: usize,
    keepcost: usize,
}

unsafe extern "C" {
    fn mallinfo2() -> Mallinfo2;
    fn malloc_trim(pad: usize) -> i32;
}

#[test]
fn swaps_under_load() {
    let number = |name: &str, default: u64| std::env::var(name).map_or(default, |text| text.parse().unwrap());
    let swaps = number("KVHOOK_SWAPS", 1000) as usize;
    let seed = number("KVHOOK_SEED", 7);
    let place = Place::new();
    let model = Arc::new(Model::load(&tiny::write(place.root(), 3)).unwrap());
    let mut random = Random(seed);
    let prompts: Vec<Vec<u32>> =
        (0..PROMPTS).map(|_| (0..PROMPT).map(|_| random.below(VOCAB) as u32).collect()).collect();
    let menu = menu();
    let arms = ARMS.iter().zip([0, 3, 5]).map(|(arm, choice)| {
        let Choice { plugin, config, .. } = &menu[choice];
        ArmConfig::new(*arm, *plugin, config)
    });
    let plugins = PluginConfig { arms: arms.collect(), ..config_of(&place) };
    let cache = CacheConfig {
        kind: CacheKind::Paged { block_size: 4, blocks: 4096 },
        ranks: RANKS,
        prefix_sharing: false,
        ..CONTIGUOUS
    };
    let config = EngineConfig { cache, chunk: 200, max_sequences: REQUESTS, plugins: Some(plugins) };
    let mut engine = Engine::new(model.clone(), config).unwrap();
    let blocks = engine.runner().usable_blocks();
    let mut alone = Alone::new(&model, &place, &prompts);
    let shared = Shared {
        plugins: engine.runner().plugins().unwrap().clone(),
        menu,
        clock: AtomicU64::new(1),
        // All room at once, or it would count as memory that swaps leave behind.
        installed: Mutex::new(Vec::with_capacity(2 * swaps)),
        step: Mutex::default(),
        in_flight: AtomicUsize::new(0),
        done: AtomicBool::new(false),
    };
    for (arm, choice) in ARMS.into_iter().zip([0, 3, 5]) {
        shared.installed.lock().unwrap().push(Installed { arm, choice, from: 0, to: u64::MAX });
    }
    let faulty = FaultyCount::find(&place);
    let mut held = Vec::new();
    // The first part warms up: what it leaves, the second may leave, too, and no more.
    for (part, swaps) in [swaps / 4, swaps - swaps / 4].into_iter().enumerate() {
        let start = Instant::now();
        shared.done.store(false, SeqCst);
        let mut server = Server {
            shared: &shared,
            engine: &mut engine,
            alone: &mut alone,
            live: HashMap::new(),
            served: Served::default(),
        };
        while server.live.len() < REQUESTS {
            server.add(&mut random);
        }
        let swapped = std::thread::scope(|scope| {
            let mut of_swaps = Random(seed + 1 + part as u64);
            let (shared, faulty) = (&shared, &faulty);
            let swapping = scope.spawn(move || {
                let _done = Done(&shared.done);
                shared.swap(swaps, &mut of_swaps, faulty)
            });
            server.serve(&mut random);
            swapping.join().unwrap()
        });
        let served = server.served;
        println!("{swapped:?} in {:.1} s; {served:?}", start.elapsed().as_secs_f64());
        assert!(served.compressed * 4 > served.finished);
        shared.check_instances(&faulty);
        assert_eq!(engine.runner().usable_blocks(), blocks);
        for arm in ARMS {
            let figures = shared.plugins.figures(arm).unwrap();
            assert_eq!(figures.live, 0);
        }
        held.push(Held::now());
    }
    println!("{} answers are known; {held:?}", alone.known.len());
    let (before, after) = (&held[0], &held[1]);
    assert_eq!((before.files, before.threads), (after.files, after.threads));
    assert!(after.heap < before.heap + (1 << 20), "{} bytes are left behind", after.heap - before.heap);
    assert!(after.resident < before.resident + (32 << 20));
    // The answers differ from plugin to plugin, or the comparison says nothing.
    let mut distinct: Vec<&Vec<u32>> = alone.known.values().collect();
    distinct.sort();
    distinct.dedup();
    assert!(distinct.len() * 2 > alone.known.len(), "{} of {}", distinct.len(), alone.known.len());
}

/// Says at its end, also by a panic, that there are no more swaps.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}
