//! Handles: numbers that name a blender or a plan, and are never dereferenced. A stale one is told from a live one for
//! ever, so a call after `_destroy` is an error instead of undefined behaviour. So is a call in a forked process on what
//! its parent made: the threads and the device that it needs stayed behind.

use std::process::id;
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
    /// Of the process that made it.
    process: u32,
    value: Shared<T>,
}

/// One thread at a time may change it, even where the caller forgot to see to that; `None` once it is destroyed.
type Shared<T> = Arc<RwLock<Option<T>>>;

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
        let place = match places.free.pop() {
            Some(place) => place,
            None if places.places.len() >> PLACE_BITS != 0 => return Err(full().into()),
            None => {
                places.places.try_reserve(1).map_err(|_| full())?;
                places.places.push(Place { generation: 0, named: None });
                places.places.len() - 1
            }
        };
        places.places[place].named = Some(Named { process: id(), value: Arc::new(RwLock::new(Some(value))) });
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
        let Named { process, value } = place.ok_or_else(|| self.unknown(handle))?;
        if *process != id() {
            let name = self.name;
            let message = format!("{name} {handle:#x} was made by process {process}, from which this one was forked");
            return Err(Fault::Argument(message));
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
        if entry.named.as_ref()?.process != id() {
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
