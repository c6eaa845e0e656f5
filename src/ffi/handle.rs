//! Handles: numbers that name a blender or a plan, and are never dereferenced. A stale one is told from a live one for
//! ever, so a call after `_destroy` is an error instead of undefined behaviour. So is a call in a forked process on what
//! its parent made: the threads and the device that it needs stayed behind.

#[cfg(unix)]
use std::ffi::c_int;
#[cfg(unix)]
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::status::{Fault, Outcome};
use crate::error::Error;

/// From the lowest bit: the kind, so that no handle is 0 or taken for one of another kind; the place; the generation.
const KIND_BITS: u32 = 4;
const PLACE_BITS: u32 = usize::BITS / 2 - KIND_BITS;
const GENERATIONS: usize = 1 << (usize::BITS / 2);

/// What handles of one kind name.
#[derive(Debug)]
pub(super) struct Handles<T> {
    kind: usize,
    name: &'static str,
    places: RwLock<Places<T>>,
}

#[derive(Debug)]
struct Places<T> {
    places: Vec<Place<T>>,
    free: Vec<usize>,
}

#[derive(Debug)]
struct Place<T> {
    generation: usize,
    named: Option<Named<T>>,
}

#[derive(Debug)]
struct Named<T> {
    /// [`FORKS`] of the process that made it.
    forks: u32,
    value: Shared<T>,
}

/// One thread at a time may change it, even where the caller forgot to see to that; `None` once it is destroyed.
type Shared<T> = Arc<RwLock<Option<T>>>;

/// How many forks lie between this process and the first that made something. Counted by the system, because to ask for
/// the process's number costs as much as the rest of a call.
static FORKS: AtomicU32 = AtomicU32::new(0);

fn forks() -> u32 {
    FORKS.load(Ordering::Relaxed)
}

/// From now on forks are counted. Says whether they are: the system may have no room for that.
#[cfg(unix)]
fn count_forks() -> bool {
    type Handler = Option<extern "C" fn()>;
    unsafe extern "C" {
        fn pthread_atfork(prepare: Handler, parent: Handler, child: Handler) -> c_int;
    }
    extern "C" fn forked() {
        FORKS.fetch_add(1, Ordering::Relaxed);
    }
    static COUNTED: OnceLock<bool> = OnceLock::new();
    // SAFETY: handlers may be NULL, and the one that is there does what a forked process may do.
    *COUNTED.get_or_init(|| unsafe { pthread_atfork(None, None, Some(forked)) } == 0)
}

/// Nothing forks.
#[cfg(not(unix))]
fn count_forks() -> bool {
    true
}

impl<T> Handles<T> {
    /// Handles of a kind from 1 to 15.
    pub(super) const fn new(kind: usize, name: &'static str) -> Self {
        Handles { kind, name, places: RwLock::new(Places { places: Vec::new(), free: Vec::new() }) }
    }

    /// Names a new value. The number is not 0.
    pub(super) fn insert(&self, value: T) -> Outcome<usize> {
        let mut guard = self.places.write().unwrap_or_else(PoisonError::into_inner);
        let places = &mut *guard;
        let full = || Error::OutOfMemory { what: "handles", bytes: size_of::<Place<T>>() as u64 };
        if !count_forks() {
            return Err(full().into());
        }
        let place = match places.free.pop() {
            Some(place) => place,
            None if places.places.len() >> PLACE_BITS != 0 => return Err(full().into()),
            None => {
                places.places.try_reserve(1).map_err(|_| full())?;
                places.places.push(Place { generation: 0, named: None });
                places.places.len() - 1
            }
        };
        places.places[place].named = Some(Named { forks: forks(), value: Arc::new(RwLock::new(Some(value))) });
        Ok((places.places[place].generation << PLACE_BITS | place) << KIND_BITS | self.kind)
    }

    /// Calls `body` with what `handle` names, beside others that read it.
    pub(super) fn read<R>(&self, handle: usize, body: impl FnOnce(&T) -> Outcome<R>) -> Outcome<R> {
        let shared = self.get(handle)?;
        let value = shared.read().map_err(|_| panicked())?;
        body(value.as_ref().ok_or_else(|| self.unknown(handle))?)
    }

    /// Calls `body` with what `handle` names, alone. A body that panics leaves what can only be destroyed.
    pub(super) fn write<R>(&self, handle: usize, body: impl FnOnce(&mut T) -> Outcome<R>) -> Outcome<R> {
        let shared = self.get(handle)?;
        let mut value = shared.write().map_err(|_| panicked())?;
        body(value.as_mut().ok_or_else(|| self.unknown(handle))?)
    }

    /// Drops what `handle` names, if it names something, once no call runs on it; calls that wait for it are refused.
    pub(super) fn destroy(&self, handle: usize) {
        // Outside of the lock on all places: dropping may wait, and other calls must not.
        let value = self.remove(handle).map(|shared| shared.write().unwrap_or_else(PoisonError::into_inner).take());
        drop(value);
    }

    /// What `handle` names.
    fn get(&self, handle: usize) -> Outcome<Shared<T>> {
        let places = self.places.read().unwrap_or_else(PoisonError::into_inner);
        let place = self.place(handle).and_then(|(place, generation)| {
            places.places.get(place).filter(|place| place.generation == generation)?.named.as_ref()
        });
        let Named { forks: made, value } = place.ok_or_else(|| self.unknown(handle))?;
        if *made != forks() {
            let name = self.name;
            return Err(Fault::Argument(format!("{name} {handle:#x} was made before this process was forked")));
        }
        Ok(value.clone())
    }

    /// Forgets what `handle` names, and gives it to the caller. What the parent of a forked process made stays where it
    /// is: dropping it would wait for threads that are not there.
    fn remove(&self, handle: usize) -> Option<Shared<T>> {
        let (place, generation) = self.place(handle)?;
        let mut guard = self.places.write().unwrap_or_else(PoisonError::into_inner);
        let places = &mut *guard;
        let entry = places.places.get_mut(place).filter(|place| place.generation == generation)?;
        if entry.named.as_ref()?.forks != forks() {
            return None;
        }
        let value = entry.named.take()?.value;
        // A place whose generations are used up names nothing any more.
        if entry.generation + 1 < GENERATIONS {
            entry.generation += 1;
            places.free.push(place);
        }
        Some(value)
    }

    fn place(&self, handle: usize) -> Option<(usize, usize)> {
        let number = handle >> KIND_BITS;
        let place = number & ((1 << PLACE_BITS) - 1);
        (handle & ((1 << KIND_BITS) - 1) == self.kind).then_some((place, number >> PLACE_BITS))
    }

    fn unknown(&self, handle: usize) -> Fault {
        Fault::Argument(match handle {
            0 => format!("{} is NULL", self.name),
            _ => format!("{} {handle:#x} is destroyed, or never was one", self.name),
        })
    }
}

fn panicked() -> Fault {
    Fault::Panicked("an earlier call on this handle panicked; all that is left is to destroy it".into())
}
