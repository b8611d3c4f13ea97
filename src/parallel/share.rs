//! Loops that the calling thread shares with rayon's pool.
//!
//! A parallel iterator of rayon that is called from a thread outside of the pool, which is what
//! Candle's callers are, hands everything over and puts the caller to sleep: two changes of thread,
//! some 60 µs, before it goes on. Here the caller begins at once, and threads of the pool that wake
//! up in time take rounds from it, so little work is worth sharing. Inside of the pool these loops
//! are rayon's own.
//!
//! `rayon::in_place_scope` lets the caller begin at once too, without any `unsafe` here, but it
//! returns only after every thread that was asked for help has come and gone, whether or not
//! anything was left for it: measured with two threads, 16 µs a call where the rounds themselves take
//! nothing, against 0.3 µs. So the loop's body goes to the pool as a reference whose lifetime is not
//! checked by the compiler, and [`Rounds`] makes sure that a thread which comes too late does not
//! use it.
//!
//! A loop inside of a call of another one is shared only once the outer one has no calls left, for which others would
//! come anyway.
//!
//! A layer is many short loops. A thread that has helped with one therefore lingers: it spins for the next one
//! for a few µs, which is less than it takes the pool to wake it again.

use rayon::prelude::*;
use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// Calls `f` for all indices below `count`, in any order and on any thread.
pub(crate) fn for_each_index(count: usize, f: impl Fn(usize) + Sync) {
    if count <= 1 || rayon::current_num_threads() == 1 || others_have_enough() {
        return (0..count).for_each(f);
    }
    let f: &(dyn Fn(usize) + Sync) = &f;
    if rayon::current_thread_index().is_some() {
        return (0..count).into_par_iter().for_each(f);
    }
    // SAFETY: only the lifetime changes, so what has to hold is that nobody uses `f` once this
    // function has been left.
    // - `f` is used in one place, `Rounds::take`, for an index below `count`. No index comes twice, because
    //   the caller, which takes once, goes up from the first, others go down from the last, and all together
    //   are let through `count` times. So there are `count` calls, each of which adds 1 to `done` when it has
    //   ended, by returning or by a panic that is caught.
    // - Once the pool has `f`, this function is left through `finish` alone, which waits until
    //   `done` is `count`. Nothing before that unwinds: `take` catches the panics of `f`, and rayon,
    //   whose pool is there since it was asked for its threads, aborts if it cannot queue a job.
    // - From then on `taken` is at least `count`. Threads that still hold `rounds`, and the last offer, with
    //   a reference in it that dangles by now, neither use nor copy that, and dropping it does nothing.
    let f = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static _>(f) };
    let rounds = Arc::new(Rounds {
        f,
        count,
        taken: AtomicUsize::new(0),
        behind: AtomicUsize::new(0),
        done: AtomicUsize::new(0),
        panic: Mutex::new(None),
        caller: std::thread::current(),
    });
    let helpers = (count - 1).min(rayon::current_num_threads() - 1);
    let offered = offer(&rounds, helpers);
    invite(&rounds, helpers - offered);
    if offered == 0 || ALONE.swap(false, Ordering::Relaxed) {
        // The kernel may put the one that is woken, or that lingers, on the processor of this thread, behind it, for
        // milliseconds, while another is idle; another thread of the pool has another place.
        invite(&rounds, 1);
    }
    let begin = Instant::now();
    if rounds.take(By::Caller).calls == count && offered > 0 && begin.elapsed() > LONG_ALONE {
        ALONE.store(true, Ordering::Relaxed);
    }
    rounds.finish();
}

thread_local! {
    /// The loop that this thread is in a call of.
    static INSIDE: Cell<*const Rounds> = const { Cell::new(std::ptr::null()) };
}

/// Whether this thread is inside of a loop that has calls left for all others, so that what it is about to do is
/// for itself alone.
fn others_have_enough() -> bool {
    let rounds = INSIDE.get();
    // SAFETY: `take`, which has put it there, has not returned, and borrows it.
    !rounds.is_null() && unsafe { &*rounds }.has_calls_left()
}

/// Whether nobody came to a loop that had been offered, although it took long enough.
static ALONE: AtomicBool = AtomicBool::new(false);
const LONG_ALONE: Duration = Duration::from_micros(15);

/// Calls `f` for all parts.
pub(crate) fn for_each<T: Send>(parts: impl IntoIterator<Item = T>, f: impl Fn(T) + Sync) {
    let parts: Vec<_> = parts.into_iter().map(|part| Mutex::new(Some(part))).collect();
    for_each_index(parts.len(), |index| {
        let part = parts[index].lock().expect("nobody panics while taking a part").take();
        f(part.expect("each index comes once"));
    });
}

/// The results of `f` for all parts, in their order.
pub(crate) fn map<T: Send, U: Send>(
    parts: impl IntoIterator<Item = T>,
    f: impl Fn(T) -> U + Sync,
) -> Vec<U> {
    let parts: Vec<T> = parts.into_iter().collect();
    let mut results: Vec<Option<U>> = parts.iter().map(|_| None).collect();
    for_each(parts.into_iter().zip(&mut results), |(part, result)| *result = Some(f(part)));
    results.into_iter().map(|result| result.expect("each part was done")).collect()
}

/// The indices of a loop, which threads take one by one.
struct Rounds {
    f: &'static (dyn Fn(usize) + Sync),
    count: usize,
    /// Calls that have been taken, and those of them that others than the caller have.
    taken: AtomicUsize,
    behind: AtomicUsize,
    /// Calls that have ended.
    done: AtomicUsize,
    /// What the first call that panicked said.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    caller: Thread,
}

/// Who takes calls: the thread that has the loop, once, or any other.
#[derive(Clone, Copy)]
enum By {
    Caller,
    Others,
}

/// What a thread has done of a loop.
struct Taken {
    calls: usize,
    /// Whether the last call of all ended here.
    last: bool,
}

/// Invitations that no thread has taken up yet.
static WAITING: AtomicUsize = AtomicUsize::new(0);

/// More are not sent out: a pool that is busy with something else for long would otherwise be left one
/// by every loop, and threads that are free take up theirs at once.
const MOST_WAITING: usize = 256;

/// Asks `helpers` threads of the pool for help: one directly, which asks the others, because
/// waking a thread takes the one that wakes it some µs.
fn invite(rounds: &Arc<Rounds>, helpers: usize) {
    if helpers == 0 {
        return;
    }
    if WAITING.fetch_add(1, Ordering::Relaxed) >= MOST_WAITING {
        WAITING.fetch_sub(1, Ordering::Relaxed);
        return;
    }
    let rounds = Arc::clone(rounds);
    rayon::spawn(move || {
        WAITING.fetch_sub(1, Ordering::Relaxed);
        let others = helpers - 1;
        if rounds.has_calls_left() {
            invite(&rounds, others / 2);
            invite(&rounds, others - others / 2);
        }
        rounds.help();
        drop(rounds);
        linger();
    });
}

/// Threads of the pool that spin for a loop.
static LINGERING: AtomicUsize = AtomicUsize::new(0);

/// The last loop that was offered to them, and the number of all offers.
static OFFER: Mutex<Option<Arc<Rounds>>> = Mutex::new(None);
static OFFERS: AtomicUsize = AtomicUsize::new(0);

/// How long a thread spins for the next loop: what lies between two of a layer.
const LINGER: Duration = Duration::from_micros(30);

/// After this time it goes back to the pool however many loops there are, which may have other jobs.
const LONGEST: Duration = Duration::from_millis(1);

/// Whether a thread would help with a loop at once.
pub(super) fn is_anyone_lingering() -> bool {
    LINGERING.load(Ordering::Relaxed) > 0
}

/// Shows `rounds` to those who linger; how many of the `helpers` that are wanted they are.
fn offer(rounds: &Arc<Rounds>, helpers: usize) -> usize {
    let there = LINGERING.load(Ordering::Relaxed).min(helpers);
    if there > 0 {
        *OFFER.lock().expect("nobody panics while offering") = Some(Arc::clone(rounds));
        OFFERS.fetch_add(1, Ordering::Release);
    }
    there
}

/// Helps with loops that are offered, until there has been none for a while. A loop that has counted on a
/// thread which leaves just then goes without it.
fn linger() {
    let begin = Instant::now();
    let mut since = begin;
    let mut seen = OFFERS.load(Ordering::Relaxed);
    LINGERING.fetch_add(1, Ordering::Relaxed);
    while since.elapsed() < LINGER && begin.elapsed() < LONGEST {
        // Acquire: the offer that the number stands for is there.
        let offers = OFFERS.load(Ordering::Acquire);
        if offers == seen {
            std::hint::spin_loop();
            continue;
        }
        seen = offers;
        LINGERING.fetch_sub(1, Ordering::Relaxed);
        let offer = OFFER.lock().expect("nobody panics while offering").clone();
        offer.inspect(|rounds| rounds.help());
        since = Instant::now();
        LINGERING.fetch_add(1, Ordering::Relaxed);
    }
    LINGERING.fetch_sub(1, Ordering::Relaxed);
}

impl Rounds {
    /// What a thread of the pool does.
    fn help(&self) {
        if self.take(By::Others).last {
            self.caller.unpark();
        }
    }

    fn has_calls_left(&self) -> bool {
        self.taken.load(Ordering::Relaxed) < self.count
    }

    /// Takes indices until none is left: the caller from the first on, others from the last on, so that each of two
    /// threads mostly has in a loop what it had in the one before.
    fn take(&self, by: By) -> Taken {
        let mut taken = Taken { calls: 0, last: false };
        loop {
            // As many as there are, so that both ends do not meet.
            if self.taken.fetch_add(1, Ordering::Relaxed) >= self.count {
                return taken;
            }
            let index = match by {
                By::Caller => taken.calls,
                By::Others => self.count - 1 - self.behind.fetch_add(1, Ordering::Relaxed),
            };
            taken.calls += 1;
            let outer = INSIDE.replace(self);
            let called = catch_unwind(AssertUnwindSafe(|| (self.f)(index)));
            INSIDE.set(outer);
            if let Err(panic) = called {
                let mut first = self.panic.lock().expect("nobody panics while storing a panic");
                match *first {
                    None => *first = Some(panic),
                    // Dropping what it says might panic again, and nobody would count this call.
                    Some(_) => std::mem::forget(catch_unwind(AssertUnwindSafe(|| drop(panic)))),
                }
            }
            // Release: the caller sees what the call has written.
            taken.last = self.done.fetch_add(1, Ordering::Release) + 1 == self.count;
        }
    }

    /// Waits for the calls that others have begun.
    fn finish(&self) {
        // They end within a round, which is mostly shorter than to sleep and to be woken.
        const SPINS: usize = 2_000;
        let mut spins = 0;
        while self.done.load(Ordering::Acquire) < self.count {
            match spins < SPINS {
                true => std::hint::spin_loop(),
                false => std::thread::park(),
            }
            spins += 1;
        }
        if let Some(panic) = self.panic.lock().expect("nobody panics while storing a panic").take()
        {
            resume_unwind(panic);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// Whoever is in a call of a loop that has more for others does what is inside of it alone.
    #[test]
    fn loops_inside_of_a_loop_are_shared_when_it_has_no_calls_left() {
        let calls = AtomicUsize::new(0);
        for_each_index(8, |outer| {
            let me = std::thread::current().id();
            let helped = AtomicBool::new(false);
            for_each_index(100, |_| {
                calls.fetch_add(1, Ordering::Relaxed);
                if std::thread::current().id() != me {
                    helped.store(true, Ordering::Relaxed);
                }
            });
            // Calls that are left now were left when the inner loop began.
            assert!(!others_have_enough() || !helped.into_inner(), "{outer}");
        });
        assert_eq!(calls.into_inner(), 800);
        assert!(!others_have_enough());
        // A call that panics leaves nothing behind.
        let panics = || for_each_index(2, |_| panic!("on purpose"));
        assert!(catch_unwind(AssertUnwindSafe(panics)).is_err());
        assert!(!others_have_enough());
    }

    #[test]
    fn every_index_comes_once() {
        for count in [0, 1, 2, 3, 17, 1000] {
            let calls: Vec<_> = (0..count).map(|_| AtomicUsize::new(0)).collect();
            for_each_index(count, |index| {
                calls[index].fetch_add(1, Ordering::Relaxed);
            });
            assert!(calls.iter().all(|calls| calls.load(Ordering::Relaxed) == 1), "{count}");
        }
    }

    #[test]
    fn results_keep_their_order_in_and_outside_of_a_pool() {
        let squares = || map(0..100u64, |x| x * x);
        let expected: Vec<u64> = (0..100).map(|x| x * x).collect();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        assert_eq!((squares(), pool.install(squares)), (expected.clone(), expected));
    }

    #[test]
    fn loops_in_loops_and_many_callers() {
        let sum = || {
            let sum = AtomicUsize::new(0);
            for_each_index(20, |i| {
                for_each_index(30, |j| {
                    sum.fetch_add(i * j, Ordering::Relaxed);
                })
            });
            sum.into_inner()
        };
        std::thread::scope(|scope| {
            let callers: Vec<_> = (0..8).map(|_| scope.spawn(sum)).collect();
            callers.into_iter().for_each(|caller| assert_eq!(caller.join().unwrap(), 190 * 435));
        });
    }

    #[test]
    fn slow_rounds_are_waited_for() {
        let done = AtomicUsize::new(0);
        for_each_index(5, |index| {
            std::thread::sleep(Duration::from_millis(index as u64));
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.into_inner(), 5);
    }

    /// Loops that follow each other at once, and after every pause that a lingering thread may miss.
    #[test]
    fn loops_whose_helpers_are_about_to_leave() {
        for pause in 0..400 {
            let sum = AtomicUsize::new(0);
            for_each_index(9, |index| _ = sum.fetch_add(index, Ordering::Relaxed));
            assert_eq!(sum.into_inner(), 36);
            let begin = Instant::now();
            while begin.elapsed() < LINGER * (pause % 20) / 10 {
                std::hint::spin_loop();
            }
        }
    }

    /// Threads that never come leave as many invitations as there may be, not one for each loop.
    #[test]
    fn a_busy_pool_is_left_a_bounded_number_of_jobs() {
        let (release, held) = std::sync::mpsc::channel::<()>();
        let held = Mutex::new(held);
        let threads = rayon::current_num_threads();
        let entered = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // Every thread of the pool waits until this test lets it go.
                rayon::broadcast(|_| {
                    entered.fetch_add(1, Ordering::Relaxed);
                    _ = held.lock().expect("nobody panics here").recv();
                })
            });
            while entered.load(Ordering::Relaxed) < threads {
                std::thread::yield_now();
            }
            // Its own, so that a failure lets the threads go as well.
            let release = release;
            let done = AtomicUsize::new(0);
            for _ in 0..10 * MOST_WAITING {
                for_each_index(2, |_| _ = done.fetch_add(1, Ordering::Relaxed));
                let waiting = WAITING.load(Ordering::Relaxed);
                // Others that run beside this test may be about to take one back.
                assert!(waiting <= MOST_WAITING + 64, "{waiting}");
            }
            assert_eq!(done.into_inner(), 20 * MOST_WAITING);
            assert!(threads == 1 || WAITING.load(Ordering::Relaxed) >= MOST_WAITING);
            (0..threads).for_each(|_| release.send(()).expect("somebody waits"));
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_after_all_rounds() {
        let done = AtomicUsize::new(0);
        let calls = catch_unwind(AssertUnwindSafe(|| {
            for_each_index(50, |index| {
                done.fetch_add(1, Ordering::Relaxed);
                assert_ne!(index, 7, "round 7");
            })
        }));
        let message = *calls.unwrap_err().downcast::<String>().unwrap();
        assert!(message.contains("round 7"), "{message}");
        // One thread alone stops at once: nobody else is in the middle of a round.
        let alone = rayon::current_num_threads() == 1;
        assert_eq!(done.into_inner(), if alone { 8 } else { 50 });
    }

    /// What the first panic says goes to the caller, what others say is dropped, which may panic too. Allocates
    /// nothing, so that AddressSanitizer finds no leak.
    #[test]
    fn what_later_panics_say_is_dropped_whatever_that_does() {
        static DROPPED: AtomicUsize = AtomicUsize::new(0);
        struct Says;
        impl Drop for Says {
            fn drop(&mut self) {
                DROPPED.fetch_add(1, Ordering::Relaxed);
                std::panic::panic_any(());
            }
        }
        let calls = || for_each_index(3, |_| std::panic::panic_any(Says));
        let said = catch_unwind(AssertUnwindSafe(calls)).unwrap_err();
        assert!(said.is::<Says>());
        std::mem::forget(said);
        let alone = rayon::current_num_threads() == 1;
        assert_eq!(DROPPED.load(Ordering::Relaxed), if alone { 0 } else { 2 });
    }
}
