# Tells find_package which versions this one is compatible with. The numbers are read from the header: gradblend_header
# of CMakeLists.txt, or the header in the prefix of an installed package.
if(NOT gradblend_header)
    set(gradblend_header "${CMAKE_CURRENT_LIST_DIR}/../../../include/gradblend.h")
endif()
if(NOT EXISTS "${gradblend_header}")
    set(PACKAGE_VERSION "unknown: there is no ${gradblend_header}")
    set(PACKAGE_VERSION_UNSUITABLE TRUE)
    return()
endif()
set(PACKAGE_VERSION "")
foreach(part MAJOR MINOR PATCH)
    file(STRINGS "${gradblend_header}" line REGEX "^#define GRADBLEND_VERSION_${part} [0-9]+$")
    string(REGEX REPLACE ".* " "." number "${line}")
    string(APPEND PACKAGE_VERSION "${number}")
endforeach()
string(SUBSTRING "${PACKAGE_VERSION}" 1 -1 PACKAGE_VERSION)

# Versions with the same first number other than 0 are compatible, as in Cargo, and have one soname.
set(series "^([1-9][0-9]*|0\\.[1-9][0-9]*|0\\.0\\.[0-9]+)")
string(REGEX MATCH "${series}" gradblend_series "${PACKAGE_VERSION}")
string(REGEX MATCH "${series}" wanted_series "${PACKAGE_FIND_VERSION}")
set(PACKAGE_VERSION_EXACT FALSE)
set(PACKAGE_VERSION_COMPATIBLE FALSE)
if(PACKAGE_FIND_VERSION_RANGE)
    # A range states compatibility itself.
    if(PACKAGE_VERSION VERSION_GREATER_EQUAL PACKAGE_FIND_VERSION_MIN
       AND (PACKAGE_VERSION VERSION_LESS PACKAGE_FIND_VERSION_MAX
            OR (PACKAGE_FIND_VERSION_RANGE_MAX STREQUAL "INCLUDE"
                AND PACKAGE_VERSION VERSION_EQUAL PACKAGE_FIND_VERSION_MAX)))
        set(PACKAGE_VERSION_COMPATIBLE TRUE)
    endif()
elseif(PACKAGE_VERSION VERSION_GREATER_EQUAL "${PACKAGE_FIND_VERSION}" AND gradblend_series STREQUAL wanted_series)
    set(PACKAGE_VERSION_COMPATIBLE TRUE)
    if(PACKAGE_VERSION VERSION_EQUAL "${PACKAGE_FIND_VERSION}")
        set(PACKAGE_VERSION_EXACT TRUE)
    endif()
endif()
