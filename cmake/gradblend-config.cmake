# find_package(gradblend 0.1 REQUIRED), with CMake 3.20 or later, defines
#
#     gradblend::shared, gradblend::static   the libraries that are installed
#     gradblend::gradblend                   the static one if BUILD_SHARED_LIBS is OFF or it is the only one, else the
#                                            shared one
#
# All paths are relative to this file in PREFIX/share/gradblend/cmake, so a prefix can be moved. `cmake --install` and
# `cargo cinstall` install the same file.
cmake_minimum_required(VERSION 3.20)
if(TARGET gradblend::gradblend)
    return()
endif()
set(gradblend_FOUND FALSE)
if(gradblend_FIND_COMPONENTS)
    set(gradblend_NOT_FOUND_MESSAGE "No components: link gradblend::shared or gradblend::static instead.")
    return()
endif()

get_filename_component(gradblend_prefix "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
set(gradblend_include "${gradblend_prefix}/include")
set(gradblend_suffix ".so")
if(CMAKE_SYSTEM_NAME STREQUAL "Darwin")
    set(gradblend_suffix ".dylib")
endif()
# Debian has a folder for each architecture, other systems have lib64. The last pattern is for a prefix that was created
# on Debian and copied to another system.
file(GLOB gradblend_folders "${gradblend_prefix}/lib/*-linux-*")
list(PREPEND gradblend_folders "${gradblend_prefix}/lib64" "${gradblend_prefix}/lib")
if(CMAKE_LIBRARY_ARCHITECTURE)
    list(PREPEND gradblend_folders "${gradblend_prefix}/lib/${CMAKE_LIBRARY_ARCHITECTURE}")
endif()
foreach(folder IN LISTS gradblend_folders)
    set(gradblend_shared "")
    set(gradblend_static "")
    if(EXISTS "${folder}/libgradblend${gradblend_suffix}")
        set(gradblend_shared "${folder}/libgradblend${gradblend_suffix}")
        set(gradblend_FOUND TRUE)
    endif()
    if(EXISTS "${folder}/libgradblend.a")
        set(gradblend_static "${folder}/libgradblend.a")
        set(gradblend_FOUND TRUE)
    endif()
    if(gradblend_FOUND)
        break()
    endif()
endforeach()
if(NOT gradblend_FOUND)
    string(REPLACE ";" ", " gradblend_folders "${gradblend_folders}")
    set(gradblend_NOT_FOUND_MESSAGE "There is no libgradblend${gradblend_suffix} or .a in ${gradblend_folders}.")
    return()
endif()
set(gradblend_scope "")
include("${CMAKE_CURRENT_LIST_DIR}/gradblend-targets.cmake")
